"""Experts: the operator against loops in float64, on every instruction set that this CPU runs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import StackedWeights

EXPERTS, CHOICES = 5, 2
HIDDEN, INTERMEDIATE = 192, 128


def layers(values: str, block_size: int, seed: int) -> tuple[list[Layer], list[Layer]]:
    """Gate and up, and down, of every expert."""
    make = to_int8 if values == "int8" else lambda layer: layer
    shapes = (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE)
    gate_up, down = (
        [
            make(random_layer(n, k, block_size=block_size, seed=seed + 100 * stack + expert))
            for expert in range(EXPERTS)
        ]
        for stack, (n, k) in enumerate(shapes)
    )
    return gate_up, down


def stacked(backend: CpuBackend, experts: list[Layer]) -> StackedWeights:
    return backend.stack([backend.pack(layer.weights) for layer in experts])


def routed(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights and ids of a router; the last expert is chosen by none."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, EXPERTS - 1, generator=generator)
    weights, ids = scores.topk(CHOICES, dim=-1)
    return weights, ids.to(torch.int32)


def oracle(x: Tensor, weights: Tensor, ids: Tensor, gate_up: list[Layer], down: list[Layer]):
    y = torch.zeros(len(x), HIDDEN, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for weight, expert in zip(weights[token], ids[token], strict=True):
            gate, up = (gate_up[expert].dense.double() @ row).chunk(2)
            gated = gate / (1 + torch.exp(-gate)) * up
            y[token] += weight.double() * (down[expert].dense.double() @ gated)
    return y


def multiply(x, weights, ids, gate_up: StackedWeights, down: StackedWeights) -> Tensor:
    operands = [
        operand
        for stack in (gate_up, down)
        for operand in (stack.packed, stack.metadata, stack.permutation, stack.scale)
    ]
    return torch.ops.permllm.sparse_experts(x, weights, ids, *operands)


def error(y: Tensor, expected: Tensor) -> float:
    return ((y.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("values", ["bfloat16", "int8"])
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("tokens", [1, 2, 7, 40])
def test_is_the_sum_of_its_experts(isa, values, block_size, tokens):
    if block_size == 128:
        pytest.skip("128 does not divide the inputs here") if HIDDEN % 128 else None
    gate_up, down = layers(values, block_size, seed=tokens)
    backend = CpuBackend(isa)
    x = torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16()
    weights, ids = routed(tokens)
    y = multiply(x, weights, ids, stacked(backend, gate_up), stacked(backend, down))
    assert y.dtype == torch.bfloat16
    assert error(y, oracle(x, weights, ids, gate_up, down)) < (3e-2 if values == "int8" else 1e-2)
