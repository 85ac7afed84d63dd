"""Tiny models as other tools save them, and permuted ones of this format.

Made with plain indexing, so that nothing here shares code with what is tested.
"""

import json
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import permllm_vllm.hf  # noqa: F401  (loads permllm checkpoints in transformers)
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import bake, decisions_of, dense_twin
from tests.offline.tiny_models import save_tokenizer, tiny_llama

QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
O, DOWN = "self_attn.o_proj", "mlp.down_proj"  # noqa: E741
LINEARS = (*QKV, O, *GATE_UP, DOWN)


def save_dense(directory: Path, dtype: torch.dtype = torch.bfloat16, **options: object) -> Path:
    tiny_llama(**options).to(dtype).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def prune_weight(weight: Tensor, kept: int = 2, group: int = 4) -> Tensor:
    """Zero all but the `kept` largest of every `group` consecutive channels."""
    groups = weight.unflatten(1, (-1, group))
    largest = groups.abs().float().topk(kept, dim=2).indices
    chosen = torch.zeros_like(groups).scatter(2, largest, groups.gather(2, largest))
    return chosen.flatten(1)


def prune(
    source: Path,
    target: Path,
    kept: int = 2,
    group: int = 4,
    dense: Collection[tuple[int, str]] = (),
) -> Path:
    """Copy a Llama checkpoint with its decoder linears pruned, but for those that stay dense."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    layers = json.loads((target / "config.json").read_text())["num_hidden_layers"]
    for layer in range(layers):
        for linear in LINEARS:
            name = f"model.layers.{layer}.{linear}.weight"
            if (layer, linear) not in dense:
                tensors[name] = prune_weight(tensors[name], kept, group)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def permute(
    dense: Path, place: Path, block_size: int = 64, pattern: str = "2:4"
) -> tuple[Path, Path]:
    """Prune a model under random permutations: stored sparse, and plain in original order."""
    model = AutoModelForCausalLM.from_pretrained(dense, dtype="auto")
    decisions = decisions_of(model, Pattern.parse(pattern), block_size)
    sparse, plain = place / "sparse", place / "plain"
    bake(model, decisions, Pattern.parse(pattern), block_size, sparse)
    dense_twin(model, decisions).save_pretrained(plain)
    for directory in (sparse, plain):
        save_tokenizer(directory)
    return sparse, plain


def write_bitmask(source: Path, target: Path, extra: tuple[str, ...] = ()) -> Path:
    """Store a checkpoint with 2:4 zeros as compressed-tensors did, `extra` matrices too."""
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
        tensors[f"{module}.compressed"] = tensor[mask].view(len(tensor), -1)
        tensors[f"{module}.bitmask"] = torch.from_numpy(bits)
        tensors[f"{module}.shape"] = torch.tensor(tensor.shape).view(-1, 1)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    set_config(
        target,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "dense",
            "global_compression_ratio": 1.5,
            "ignore": ["lm_head"],
            "quantization_status": "frozen",
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
