"""Numbers that are almost zero: which kernels keep them is stated in csrc/cpu/kernels.h."""

from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.test_int8 import INTEGERS

N, K = 16, 64
TOKENS = (1, 7, 12, 17, 40, 100)  # every kernel
SUBNORMAL = 2.0**-130
FLUSHING = ("amx", "avx512_bf16", "zen5")
"""Whose instructions for bfloat16 take subnormal numbers as zero."""


def product(
    isa: str, weights: CheckpointWeights, x: float, bias: float, tokens: int
) -> torch.Tensor:
    """Of tokens that have one channel, with a bias that is the same for all outputs."""
    packed = CpuBackend(isa).pack(weights)
    inputs = torch.zeros(tokens, K, dtype=torch.bfloat16)
    inputs[:, 0] = x
    added = torch.full((N,), bias, dtype=torch.bfloat16)
    operands = packed.packed, packed.metadata, packed.permutation, packed.scale, added
    return ops.sparse_linear(inputs, *operands, N, "2:4")


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("weight", "x", "bias"), [(SUBNORMAL, 1.0, 0.0), (1.0, SUBNORMAL, 0.0), (0.0, 0.0, SUBNORMAL)]
)
def test_subnormal_numbers(isa: str, weight: float, x: float, bias: float, tokens: int) -> None:
    layer = random_layer(N, K, permuted=False)
    weights = replace(layer.weights, values=torch.full_like(layer.weights.values, weight))
    expected = (layer.dense[:, 0] != 0) * (weight * x) + bias
    y = product(isa, weights, x, bias, tokens)
    assert expected.max() == SUBNORMAL
    assert torch.equal(y.double(), expected.double().expand(tokens, N) * (isa not in FLUSHING))


@pytest.mark.parametrize("tokens", TOKENS)
def test_tokens_of_int8_values(isa: str, tokens: int) -> None:
    layer = to_int8(random_layer(N, K, permuted=False))
    ones = torch.ones_like(layer.weights.values), torch.ones(N)
    weights = replace(layer.weights, values=ones[0], scale=ones[1])
    kept = (layer.dense[:, 0] != 0).double()
    for x, zero in ((2.0**-99, False), (2.0**-101, isa in INTEGERS)):
        y = product(isa, weights, x, 0.0, tokens)
        expected = kept.expand(tokens, N) * (0 if zero else x)
        assert torch.allclose(y.double(), expected, rtol=2**-8, atol=0)
    y = product(isa, weights, 0.0, SUBNORMAL, tokens)
    assert (y.double() == (0 if isa == "amx" else SUBNORMAL)).all()
