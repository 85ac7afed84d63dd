"""The dense peer computes what this project's loop computes, and both take steps."""

import pytest
import torch
from torch import nn

from benchmarks.dense_permutations import DenseMaskedLinear, DensePermutation, SharedMatrix
from benchmarks.offline_cost import LOOPS, PATTERN, measure_step
from permllm_offline.masked_linear import PermutedMaskedLinear, StepPermutation


def test_both_loops_mask_alike_under_one_permutation() -> None:
    generator = torch.Generator().manual_seed(0)
    permutation = DensePermutation(32, 16, generator)
    matrix = permutation().detach()
    assert torch.equal(matrix.round().sum(0), torch.ones(32))
    assert not matrix[:16, 16:].any()
    linear = nn.Linear(32, 8, bias=False).requires_grad_(False)
    importance, inputs = linear.weight.abs(), torch.randn(3, 32, generator=generator)
    dense = DenseMaskedLinear(linear, importance, PATTERN, SharedMatrix(permutation))(inputs)
    step = StepPermutation(matrix.argmax(0), torch.arange(2))
    ours = PermutedMaskedLinear(linear, importance, PATTERN, step)(inputs)
    torch.testing.assert_close(dense, ours)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_step_of_each_loop_is_measured(loop: str) -> None:
    cost = measure_step(loop, 128, 16, 2)
    assert cost.seconds > 0
    assert 0 < cost.assignments <= 4
