"""The linear layers of a Llama: pruned here from dense weights, or read from a sparse checkpoint.

Needs PyTorch; to read a sparse checkpoint also safetensors and pydantic.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cuda.llama import Linear, Shape, shape_of
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, select_backend
from permllm_vllm.checkpoint import packing, permutation
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN = Pattern(2, 4)
BLOCK = 64
#: The projections that vLLM merges, in its order, by the name of what they become.
MERGED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
Layers = Iterator[dict[str, "Pruned"]]
"""Of one decoder layer after the other, made when it is asked for: a GPU may not hold them all."""
Linears = list[dict[str, Linear]]


@dataclasses.dataclass(frozen=True)
class Pruned:
    """One linear layer: packed as a checkpoint holds it, and dense in the order of its inputs."""

    weights: CheckpointWeights | None
    """None for a layer that was not pruned."""
    dense: Tensor


def dense_linear(layer: Pruned) -> Linear:
    weight = layer.dense  # and not the layer, whose packed weights would stay in memory
    return lambda x: functional.linear(x, weight)


def sparse_linear(layer: Pruned) -> Linear:
    if layer.weights is None:
        return dense_linear(layer)
    rows = layer.dense.shape[0]
    pattern = str(layer.weights.pattern)
    packed = select_backend(layer.dense.device, layer.dense.dtype).pack(layer.weights)
    return lambda x: ops.sparse_linear(
        x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, rows, pattern
    )


def both(layers: Layers) -> tuple[Linears, Linears]:
    """The dense and the sparse products of every layer.

    Each is packed once. What a checkpoint holds of it is dropped before the next one is made.
    """
    pairs = list(map(_both, layers))
    return [dense for dense, _ in pairs], [sparse for _, sparse in pairs]


def _both(layer: dict[str, Pruned]) -> tuple[dict[str, Linear], dict[str, Linear]]:
    dense = {name: dense_linear(each) for name, each in layer.items()}
    return dense, {name: sparse_linear(each) for name, each in layer.items()}


def prune(weight: Tensor, *, permuted: bool) -> Pruned:
    """Keeps the two largest of every four, in a random permutation where `permuted`."""
    local = None
    if permuted:
        blocks = torch.rand(weight.shape[1] // BLOCK, BLOCK, device=weight.device)
        local = blocks.argsort(dim=1).flatten().to(torch.uint8)
        weight = permutation.permute_columns(weight, local, BLOCK)
    groups = weight.abs().unflatten(1, (-1, PATTERN.group))
    kept = groups.topk(PATTERN.kept, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(1)
    dense = weight * mask
    if local is not None:
        dense = permutation.unpermute_columns(dense, local, BLOCK)
    packed = CheckpointWeights(
        packing.pack_values(weight, mask, PATTERN),
        packing.pack_mask(mask),
        local,
        None,
        PATTERN,
        BLOCK,
    )
    return Pruned(packed, dense)


def prune_layers(shape: Shape, weights: Mapping[str, Tensor]) -> Layers:
    """Merges q, k, v and gate, up as vLLM does, and prunes; what reads a norm is permuted."""
    return (
        {
            merged: prune(
                torch.cat([weights[f"model.layers.{i}.{name}.weight"] for name in names]),
                permuted=merged in ("qkv", "gate_up"),
            )
            for merged, names in MERGED.items()
        }
        for i in range(shape.num_hidden_layers)
    )


def is_sparse(directory: Path) -> bool:
    """Whether a checkpoint was pruned and packed already."""
    config = json.loads((directory / "config.json").read_text())
    return (config.get("quantization_config") or {}).get("quant_method") == "permllm"


def read(
    directory: Path, dtype: torch.dtype, device: torch.device
) -> tuple[Shape, dict[str, Tensor], Layers]:
    """A sparse checkpoint of a Llama: its sizes, what is not linear, and its layers.

    What is wrong with a layer is raised when that is asked for.

    Raises:
        CheckpointError: the checkpoint breaks a rule of its format.
        SystemExit: pydantic is missing, or merged projections have different permutations.
    """
    try:
        from permllm_vllm.checkpoint.reader import CheckpointReader
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"{directory} is a sparse checkpoint, and reading one needs {error.name}: install it, "
            "or pass a dense checkpoint, which is pruned here"
        ) from error
    reader = CheckpointReader(directory)
    assert reader.quantization is not None
    pattern, block_size = Pattern.parse(reader.quantization.pattern), reader.quantization.block_size
    shape = shape_of(reader.config, directory)
    sparse = set(reader.sparse_layers())

    def part(name: str) -> Pruned:
        if name not in sparse:
            return Pruned(None, reader.tensor(f"{name}.weight").to(device, dtype))
        layer = reader.layer(name)
        values = layer.values if layer.scale is not None else layer.values.to(dtype)
        optional = (layer.input_permutation, layer.scale)
        local, scale = (None if tensor is None else tensor.to(device) for tensor in optional)
        weights = CheckpointWeights(
            values.to(device), layer.mask.to(device), local, scale, pattern, block_size
        )
        return Pruned(weights, layer.dense(pattern, block_size).to(device, dtype))

    layers = (
        {
            merged: merge(
                [part(f"model.layers.{i}.{name}") for name in names], f"layer {i} {merged}"
            )
            for merged, names in MERGED.items()
        }
        for i in range(shape.num_hidden_layers)
    )
    fixed = {
        name: reader.tensor(name).to(device, dtype)
        for name in reader.names()
        if name.endswith("norm.weight") or name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    fixed.setdefault("lm_head.weight", fixed["model.embed_tokens.weight"])
    return shape, fixed, layers


def merge(parts: Sequence[Pruned], name: str) -> Pruned:
    """One layer of several that have the same inputs.

    Raises:
        SystemExit: their permutations differ, or some of them are sparse and others are not.
    """
    dense = torch.cat([part.dense for part in parts])
    weights = [part.weights for part in parts if part.weights is not None]
    if not weights:
        return Pruned(None, dense)
    first = weights[0]
    permutations = [each.permutation for each in weights]
    same = all(
        (each is None) == (first.permutation is None)
        and (each is None or first.permutation is None or torch.equal(each, first.permutation))
        for each in permutations
    )
    if len(weights) < len(parts) or not same:
        raise SystemExit(
            f"{name}: its projections must all be sparse and in the same permutation, to be "
            "multiplied together; serve this checkpoint with vLLM"
        )
    scales = [each.scale for each in weights if each.scale is not None]
    return Pruned(
        dataclasses.replace(
            first,
            values=torch.cat([each.values for each in weights]),
            mask=torch.cat([each.mask for each in weights]),
            scale=torch.cat(scales) if scales else None,
        ),
        dense,
    )
