"""Int4 values in the order that is learned, against dense matrices under plain autograd."""

import pytest
import torch
from torch import Tensor, nn

from benchmarks.studies.rounded_linear import RoundedLinear
from benchmarks.studies.rounding import rounded
from permllm_offline.permutation.masked_linear import StepPermutation
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN, BLOCK, CHANNELS, ROWS, GROUP = Pattern(2, 4), 16, 32, 6, 8


def hard(soft: Tensor, value: Tensor) -> Tensor:
    """The value with the gradient of another."""
    return value.detach() + soft - soft.detach()


def dense_product(
    inputs: Tensor, matrix: Tensor, weight: Tensor, importance: Tensor | None
) -> Tensor:
    """[tokens, channels] times int4 values of [rows, channels] under a permutation matrix."""
    mask = torch.ones_like(weight)
    if importance is not None:
        score = (importance / importance.mean() @ matrix).unflatten(1, (-1, PATTERN.group))
        soft = score.softmax(-1)
        kept = torch.zeros_like(soft).scatter(-1, score.topk(PATTERN.kept, dim=-1).indices, 1.0)
        mask = hard(soft, kept).flatten(1) @ matrix.t()
    magnitude = (weight.abs() @ matrix).unflatten(1, (-1, GROUP))
    magnitude = magnitude * (mask.detach() @ matrix.detach()).unflatten(1, (-1, GROUP))
    weights = (magnitude / magnitude.mean()).softmax(-1).detach()
    # The weighted mean is over all channels of the group, those that the mask pruned too.
    plain = (weight.abs() @ matrix).unflatten(1, (-1, GROUP))
    largest = hard((weights * plain).sum(-1), magnitude.amax(-1))
    step = (largest / 7).repeat_interleave(GROUP, 1) @ matrix.t()
    sparse = weight * mask
    off = ((sparse / step).round() - sparse / step).detach()
    return inputs @ (sparse + step * off).t()


@pytest.mark.parametrize("sparse", [False, True])
def test_values_and_gradients_are_those_of_dense_matrices(sparse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(CHANNELS, ROWS).requires_grad_(False)
    weight, importance = linear.weight.clone(), linear.weight.abs() + 0.1
    local = torch.stack([torch.randperm(BLOCK, generator=generator) for _ in range(2)])
    order = (local + torch.arange(2)[:, None] * BLOCK).flatten()
    inputs = torch.randn((5, CHANNELS), generator=generator)
    gradient = torch.randn((5, ROWS), generator=generator)

    soft = torch.eye(BLOCK)[local].mT.contiguous().requires_grad_()
    step = StepPermutation(order, torch.arange(2), soft)
    module = RoundedLinear(linear, importance, PATTERN, step, group=GROUP, sparse=sparse)
    mine = inputs.clone().requires_grad_()
    output = module(mine)
    output.backward(gradient)

    matrix = torch.eye(CHANNELS)[order].t().contiguous().requires_grad_()
    other = inputs.clone().requires_grad_()
    expected = dense_product(other, matrix, weight, importance if sparse else None) + linear.bias
    expected.backward(gradient)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(mine.grad, other.grad)
    assert soft.grad is not None
    assert matrix.grad is not None
    blocks = [matrix.grad[start : start + BLOCK, start : start + BLOCK] for start in (0, BLOCK)]
    torch.testing.assert_close(soft.grad, torch.stack(blocks))


def test_values_are_those_that_the_study_measures() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(CHANNELS, ROWS, bias=False).requires_grad_(False)
    weight, order = linear.weight.clone(), torch.randperm(CHANNELS, generator=generator)
    step = StepPermutation(order, torch.arange(2))
    module = RoundedLinear(linear, weight.abs(), PATTERN, step, group=GROUP, sparse=False)
    identity = torch.eye(CHANNELS)
    torch.testing.assert_close(module(identity).t(), rounded(weight, order, GROUP))
