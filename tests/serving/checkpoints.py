"""A sparse checkpoint of a model, and the same weights as a dense one with zeros.

Pruned by magnitude under random permutations: run-time ones for the linears that a norm feeds,
folded ones for `down` and `o`. The dense twin stays in the model's own channel order and is made
with plain indexing, so it shares no code with what it is compared to.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.writer import write_checkpoint

BLOCK = 64
PATTERN = Pattern(2, 4)
ATTENTION_INPUTS, MLP_INPUTS = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Twins:
    """Two directories with the same model: sparse in PermLLM's format, and dense with zeros.

    `parent` is the model that both were pruned from.
    """

    sparse: Path
    dense: Path
    parent: Path


def random_llama(directory: Path) -> Path:
    """Write a Llama with random weights: 2 layers, 4 query heads of 64 channels, one KV head."""
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def random_mixtral(directory: Path) -> Path:
    """Write a Mixtral with random weights: 2 layers with 4 experts, 2 of them for every token."""
    config = MixtralConfig(
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=512,
        max_position_embeddings=1024,
        initializer_range=0.05,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def prune(
    source: Path,
    directory: Path,
    *,
    every: int = 1,
    ignore: Sequence[str] = ("lm_head",),
    experts: bool = True,
) -> Twins:
    """Prune the linears of every n-th decoder layer of a Llama checkpoint.

    Of a model with experts, those of the attention and, unless `experts` says no, of the experts;
    `ignore` must name what is left.
    """
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    twins = Twins(directory / "sparse", directory / "dense", source)
    generator = torch.Generator().manual_seed(0)
    runtime, folded = [], []
    sparse = dict(weights)
    layers = range(config["num_hidden_layers"])
    for layer in layers[::every]:
        prefix = f"model.layers.{layer}."
        attention = _indices(config["hidden_size"], generator)
        mlp = _indices(config["hidden_size"], generator)
        for name in ATTENTION_INPUTS:
            runtime.append(f"{prefix}self_attn.{name}")
            _prune_linear(runtime[-1], attention, weights, sparse, "input_permutation")
        dense_mlp = f"{prefix}mlp.down_proj.weight" in weights
        for name in MLP_INPUTS if dense_mlp else ():
            runtime.append(f"{prefix}mlp.{name}")
            _prune_linear(runtime[-1], mlp, weights, sparse, "input_permutation")
        for expert in _experts(prefix, weights) if experts else ():
            runtime += [f"{expert}.w1", f"{expert}.w3"]
            folded.append(f"{expert}.w2")
            inner = _indices(config["intermediate_size"], generator)
            own = _indices(config["hidden_size"], generator)
            for name in runtime[-2:]:
                _prune_linear(name, own, weights, sparse, "input_permutation")
                _move_rows(name, inner, sparse)
            _prune_linear(folded[-1], inner, weights, sparse, "folded_permutation")
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        value, output = _tied_indices(heads, kv_heads, config["hidden_size"] // heads, generator)
        down = _indices(config["intermediate_size"], generator)
        folds = [(f"{prefix}self_attn.o_proj", output)]
        if dense_mlp:
            folds.append((f"{prefix}mlp.down_proj", down))
        for name, index in folds:
            folded.append(name)
            _prune_linear(name, index, weights, sparse, "folded_permutation")
        _move_rows(f"{prefix}self_attn.v_proj", value, sparse)
        for name in MLP_INPUTS if dense_mlp else ():
            _move_rows(f"{prefix}mlp.{name}", down, sparse)
    write_checkpoint(
        twins.sparse,
        iter(sparse.items()),
        QuantizationConfig(
            pattern=str(PATTERN),
            block_size=BLOCK,
            value_dtype="bfloat16",
            ignore=[*ignore, *(rf"re:model\.layers\.{n}\..*" for n in layers if n % every)],
            runtime_permuted=runtime,
            folded=folded,
        ),
        source,
    )
    _write_dense(twins.dense, weights, source)
    return twins


def _experts(prefix: str, weights: dict[str, Tensor]) -> list[str]:
    """Modules of the experts of a decoder layer, each with w1, w2 and w3."""
    inside = (name for name in weights if name.startswith(prefix) and name.endswith(".w1.weight"))
    return sorted(name.removesuffix(".w1.weight") for name in inside)


def corrupt(sparse: Path, directory: Path, tensor: str, rows: int) -> Path:
    """Copy a sparse checkpoint with one block damaged: the kept values of the first 64 inputs of
    the first `rows` rows change their sign. It stays valid, so that only its answers are wrong.
    """
    shutil.copytree(sparse, directory)
    file = directory / "model.safetensors"
    weights = load_file(file)
    weights[tensor][:rows, : BLOCK // 2] *= -1
    save_file(weights, file, metadata={"format": "pt"})
    return directory


def _indices(channels: int, generator: torch.Generator) -> Tensor:
    """Random permutation inside every block, as channel numbers of the whole layer."""
    starts = range(0, channels, BLOCK)
    return torch.cat([start + torch.randperm(BLOCK, generator=generator) for start in starts])


def _tied_indices(
    heads: int, kv_heads: int, head_size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Permutation of the value rows, and that of `o`: equal for the query heads of a KV head."""
    value = _indices(kv_heads * head_size, generator).view(kv_heads, head_size)
    within = value % head_size
    of_query = within.repeat_interleave(heads // kv_heads, dim=0)
    return value.flatten(), (of_query + head_size * torch.arange(heads).unsqueeze(1)).flatten()


def _prune_linear(
    module: str, index: Tensor, dense: dict[str, Tensor], sparse: dict[str, Tensor], kind: str
) -> None:
    """Put the pruned weight into `dense`, and the tensors of the format into `sparse`."""
    weight = dense[f"{module}.weight"]
    permuted = weight[:, index]
    mask = _largest_of_every_group(permuted.abs())
    pruned = torch.zeros_like(weight)
    pruned[:, index] = permuted * mask
    dense[f"{module}.weight"] = pruned
    del sparse[f"{module}.weight"]
    sparse[f"{module}.weight_packed"] = pack_values(permuted, mask, PATTERN)
    sparse[f"{module}.weight_mask"] = pack_mask(mask)
    sparse[f"{module}.{kind}"] = (index % BLOCK).to(torch.uint8)


def _largest_of_every_group(importance: Tensor) -> Tensor:
    """Mask of the N largest of every M; the first of equal ones wins."""
    members = importance.unflatten(1, (-1, PATTERN.group)).unbind(2)
    ahead = [
        sum((b >= a if j < i else b > a).byte() for j, b in enumerate(members) if j != i)
        for i, a in enumerate(members)
    ]
    return torch.stack([count < PATTERN.kept for count in ahead], dim=2).flatten(1)


def _move_rows(module: str, index: Tensor, sparse: dict[str, Tensor]) -> None:
    for kind in ("weight_packed", "weight_mask", "bias"):
        if f"{module}.{kind}" in sparse:
            sparse[f"{module}.{kind}"] = sparse[f"{module}.{kind}"][index].contiguous()


def _write_dense(directory: Path, weights: dict[str, Tensor], source: Path) -> None:
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
