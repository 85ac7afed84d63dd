"""The paper's dense matrices compute what this project's loop computes, and learn alike."""

import torch
from torch import nn

from benchmarks.pruning.dense_permutations import DenseMaskedLinear, DensePermutation, SharedMatrix
from benchmarks.pruning.layer_step import PATTERN
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation

BLOCK, BLOCKS = 16, 2


def test_output_and_gradient_of_the_matrix_are_those_of_the_gathers() -> None:
    generator = torch.Generator().manual_seed(0)
    permutation = DensePermutation(BLOCK * BLOCKS, BLOCK, generator).double()
    shared = SharedMatrix(permutation)
    matrix = shared.get(torch.double)
    matrix.retain_grad()
    assert torch.equal(matrix.round().sum(0), torch.ones(BLOCK * BLOCKS).double())
    assert not matrix[:BLOCK, BLOCK:].any()

    linear = nn.Linear(BLOCK * BLOCKS, 8, bias=False).double().requires_grad_(False)
    importance = torch.rand(linear.weight.shape, generator=generator, dtype=torch.double)
    importance /= importance.mean()  # as PermutedMaskedLinear does
    inputs = torch.randn(3, BLOCK * BLOCKS, generator=generator, dtype=torch.double)
    theirs = DenseMaskedLinear(linear, importance, PATTERN, shared)(inputs)

    soft = torch.zeros(BLOCKS, BLOCK, BLOCK, dtype=torch.double, requires_grad=True)
    step = StepPermutation(matrix.argmax(0), torch.arange(BLOCKS), soft)
    ours = PermutedMaskedLinear(linear, importance, PATTERN, step)(inputs)
    torch.testing.assert_close(theirs, ours)

    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.double)
    theirs.backward(upstream)
    ours.backward(upstream)
    assert matrix.grad is not None
    assert soft.grad is not None
    for block, found in enumerate(soft.grad):
        channels = slice(block * BLOCK, (block + 1) * BLOCK)
        torch.testing.assert_close(matrix.grad[channels, channels], found, check_dtype=False)
    assert permutation.weight.grad is not None
    assert permutation.weight.grad.abs().max() > 0
