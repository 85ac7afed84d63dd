"""Shapes and random sparse layers, shared by the kernel benchmarks and the kernel tests."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.checkpoint import packing, permutation
from permllm_vllm.checkpoint.pattern import Pattern

#: (outputs, inputs) of Llama-2-7B's linear layers as vLLM fuses them: qkv, o, gate_up, down.
LLAMA_2_7B = ((12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008))


@dataclass(frozen=True)
class ExpertShape:
    """The experts of a layer, those that a token goes to, and their channels."""

    experts: int
    choices: int
    hidden: int
    inner: int


EXPERTS = {
    "olmoe-1b-7b": ExpertShape(experts=64, choices=8, hidden=2048, inner=1024),
    "qwen3-30b-a3b": ExpertShape(experts=128, choices=8, hidden=2048, inner=768),
}
TOKENS = (1, 4, 16, 64, 256)
SHAPE = re.compile(r"([1-9]\d*)x([1-9]\d*)", re.ASCII)
KEPT = 32
"""Of the 64 inputs whose values have a multiplier together, where they are in 4 bits."""
VALUES = ("bfloat16", "int8")
"""Dtypes of the kept values."""


def parse_shape(text: str) -> tuple[int, int]:
    """Argument type: NxK, outputs and inputs.

    Raises:
        ArgumentTypeError: it is something else.
    """
    found = SHAPE.fullmatch(text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape: give outputs x inputs, each at least 1, such as 4096x11008"
        )
    return int(found[1]), int(found[2])


@dataclass(frozen=True)
class Layer:
    """A random sparse layer: as a checkpoint holds it, and as a dense weight `[out, in]`."""

    weights: CheckpointWeights
    dense: Tensor
    bias: Tensor | None


def random_mask(n: int, k: int, pattern: Pattern, generator: torch.Generator) -> Tensor:
    """A uniformly random bool mask `[n, k]` that keeps exactly N of every M inputs."""
    scores = torch.rand(n, k, generator=generator, device=generator.device).cpu()
    return _largest(scores, pattern)


def _largest(scores: Tensor, pattern: Pattern) -> Tensor:
    """The bool mask of the N largest of every M scores `[n, k]`."""
    groups = scores.unflatten(-1, (-1, pattern.group))
    kept = groups.topk(pattern.kept, dim=-1).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, kept, True).flatten(-2)


def random_layer(
    n: int,
    k: int,
    pattern: str = "2:4",
    block_size: int = 64,
    *,
    permuted: bool = True,
    bias: bool = False,
    zeros: bool = False,
    by_magnitude: bool = False,
    seed: int = 0,
    drawn_on: torch.device | str = "cpu",
) -> Layer:
    """Draws a layer with bfloat16 values.

    `by_magnitude` keeps the largest weights of each group, as pruning does, else any of them.
    `zeros` sets some kept values to 0 and -0, and every value of the first row, and of a group of
    every row, to zero: kept zeros must stay in their places. `drawn_on` is the device that draws
    the numbers, which are others on each; the layer is on the host.
    """
    generator = torch.Generator(drawn_on).manual_seed(seed)
    parsed = Pattern.parse(pattern)
    mask = random_mask(n, k, parsed, generator)
    weight = torch.randn(n, k, generator=generator, device=drawn_on).cpu()
    weight = weight.mul_(k**-0.5).to(torch.bfloat16)
    if by_magnitude:
        mask = _largest(weight.abs(), parsed)
    if zeros:
        weight[:, ::7] = -0.0
        weight[:, ::11] = 0.0
        weight[:, : parsed.group] = 0.0
        weight[0] = -0.0
    local = None
    dense = weight * mask
    if permuted:
        blocks = k // block_size
        order = torch.rand(blocks, block_size, generator=generator, device=drawn_on).cpu()
        local = order.argsort(-1).flatten().to(torch.uint8)
        dense = permutation.unpermute_columns(dense, local, block_size)
    drawn_bias = torch.randn(n, generator=generator, device=drawn_on).cpu() if bias else None
    return Layer(
        CheckpointWeights(
            values=packing.pack_values(weight, mask, parsed),
            mask=packing.pack_mask(mask),
            permutation=local,
            scale=None,
            pattern=parsed,
            block_size=block_size,
        ),
        dense,
        None if drawn_bias is None else drawn_bias.to(torch.bfloat16),
    )


def to_int8(layer: Layer) -> Layer:
    """The layer with int8 values, the largest of each row 127; `dense` is float32, of those."""
    values = layer.weights.values.float()
    scale = values.abs().amax(dim=1).clamp_min(1e-6) / 127
    quantized = (values / scale.unsqueeze(1)).round().to(torch.int8)
    weights = replace(layer.weights, values=quantized, scale=scale)
    dense = (layer.dense.float() / scale.unsqueeze(1)).round() * scale.unsqueeze(1)
    return Layer(weights, dense, layer.bias)


def to_int4(layer: Layer) -> Layer:
    """The layer with int8 values that fit 4 bits: at most 8 steps, of 1 to 16 for 64 inputs."""
    own, kept = layer.weights, layer.weights.values.shape[1]
    values = functional.pad(own.values.float(), (0, -kept % KEPT)).unflatten(1, (-1, KEPT))
    steps = values.abs().amax(dim=-1).clamp_min(1e-6) / 7
    scale = steps.amax(dim=1) / 16
    multipliers = (steps / scale[:, None]).ceil()
    integers = (values / (multipliers * scale[:, None])[..., None]).round().clamp(-8, 7)
    quantized = (integers * multipliers[..., None]).flatten(1)[:, :kept].to(torch.int8)
    dense = packing.unpack(quantized, own.mask).float() * scale[:, None]
    if own.permutation is not None:
        dense = permutation.unpermute_columns(dense, own.permutation, own.block_size)
    return Layer(replace(own, values=quantized, scale=scale), dense, layer.bias)
