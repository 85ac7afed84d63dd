"""Tiny models as other tools save them: zeros that obey N:M in some order of the channels.

Made with plain indexing, so that nothing here shares code with what is tested.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import permllm_vllm.hf  # noqa: F401  (loads permllm checkpoints in transformers)
from tests.offline.tiny_models import save_tokenizer, tiny_llama

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"  # noqa: E741
LINEARS = (*QKV, O, *GATE_UP, DOWN)

OrderOf = Callable[[int, str, int], Tensor | None]
"""(decoder layer, linear, channels) -> order of the channels; None leaves the linear dense."""


def save_dense(directory: Path, dtype: torch.dtype = torch.bfloat16, **options: object) -> Path:
    tiny_llama(**options).to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def in_place(layer: int, linear: str, channels: int) -> Tensor:
    return torch.arange(channels)


def block_orders(seed: int = 0, block: int = 64, *, tied: bool = True) -> OrderOf:
    """A random order inside every block, shared by the linears that read one input.

    Tied: for `o` the same in all blocks, as one key-value head of one block asks for.
    """
    shared = {**dict.fromkeys(QKV, "qkv"), **dict.fromkeys(GATE_UP, "gate_up")}

    def order_of(layer: int, linear: str, channels: int) -> Tensor:
        key = f"{seed} {layer} {shared.get(linear, linear)}"
        generator = torch.Generator().manual_seed(sum(i * ord(c) for i, c in enumerate(key, 1)))
        orders = [torch.randperm(block, generator=generator) for _ in range(channels // block)]
        if linear == O and tied:
            orders = orders[:1] * len(orders)
        return torch.cat([order + i * block for i, order in enumerate(orders)])

    return order_of


def prune_in_order(weight: Tensor, order: Tensor, kept: int, group: int) -> Tensor:
    """Zero all but the `kept` largest of every `group` consecutive channels of `order`."""
    pruned = torch.zeros_like(weight)
    for start in range(0, len(order), group):
        channels = order[start : start + group]
        largest = weight[:, channels].abs().float().topk(kept, dim=1).indices
        chosen = channels[largest]
        pruned.scatter_(1, chosen, weight.gather(1, chosen))
    return pruned


def prune(source: Path, target: Path, order_of: OrderOf, kept: int = 2, group: int = 4) -> Path:
    """Copy a Llama checkpoint with its decoder linears pruned, in the original channel order."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for linear in LINEARS:
            name = f"model.layers.{layer}.{linear}.weight"
            order = order_of(layer, linear, tensors[name].shape[1])
            if order is not None:
                tensors[name] = prune_in_order(tensors[name], order, kept, group)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_bitmask(source: Path, target: Path, extra: tuple[str, ...] = ()) -> Path:
    """Store a checkpoint with 2:4 zeros as compressed-tensors did, `extra` matrices too.

    The weights may be in 8 bits, with scales beside them.
    """
    shutil.copytree(source, target)
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not is_linear(name) and module not in extra:
            tensors[name] = tensor
            continue
        largest = tensor.float().view(-1, 4).abs().topk(2, dim=1).indices
        mask = torch.zeros(tensor.numel() // 4, 4, dtype=torch.bool).scatter_(1, largest, True)
        mask = mask.view(tensor.shape)
        bits = numpy.packbits(mask.numpy(), axis=-1, bitorder="little")
        stored = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        tensors[f"{module}.compressed"] = stored[mask].view(len(tensor), -1).view(tensor.dtype)
        tensors[f"{module}.bitmask"] = torch.from_numpy(bits)
        tensors[f"{module}.shape"] = torch.tensor(tensor.shape).view(-1, 1)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    quantized = json.loads((source / "config.json").read_text()).get("quantization_config")
    unquantized = {
        "quant_method": "compressed-tensors",
        "format": "dense",
        "global_compression_ratio": 1.5,
        "ignore": ["lm_head"],
        "quantization_status": "frozen",
    }
    set_config(
        target,
        quantization_config={
            **(quantized or unquantized),
            "sparsity_config": {
                "format": "sparse-24-bitmask",
                "global_sparsity": 0.4,
                "ignore": ["lm_head"],
                "registry_requires_subclass": False,
                "sparsity_structure": "2:4",
                "targets": ["Linear"],
            },
        },
    )
    return target


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear of a decoder layer."""
    return name.removesuffix(".weight").endswith(LINEARS) and name.endswith(".weight")


def masks_of(pruned: Path) -> dict[str, Tensor]:
    """What the linears of a checkpoint keep."""
    tensors = load_file(pruned / "model.safetensors")
    return {name: tensor != 0 for name, tensor in tensors.items() if is_linear(name)}


def write_masks(file: Path, masks: Mapping[str, Tensor]) -> Path:
    """As MaskLLM's `tool_compress_mask.py` does."""
    file.parent.mkdir(exist_ok=True)
    packed = {f"{name}.mask": numpy.packbits(mask.numpy()) for name, mask in masks.items()}
    numpy.savez_compressed(file, **packed)
    return file


def set_config(directory: Path, **entries: object) -> None:
    config = json.loads((directory / "config.json").read_text()) | entries
    (directory / "config.json").write_text(json.dumps(config))


def quantization(directory: Path) -> dict[str, Any]:
    """What a checkpoint of this format says of itself."""
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def logits(directory: Path) -> Tensor:
    """Answers to random tokens, of the weights that are stored."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokens = torch.randint(2, 60, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(tokens).logits


def same_weights(first: Path, second: Path) -> bool:
    """Whether two checkpoints hold equal tensors of equal dtypes; -0.0 equals 0.0."""
    one, two = load_all(first), load_all(second)
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and torch.equal(one[name], two[name]) for name in one
    )


def load_all(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in directory.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors
