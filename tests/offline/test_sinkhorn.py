from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permllm_offline.sinkhorn import harden, sinkhorn


def plain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    soft = np.exp(logits / temperature)
    for _ in range(iterations):
        for row in range(len(soft)):
            soft[row] /= soft[row].sum()
        for column in range(len(soft)):
            soft[:, column] /= soft[:, column].sum()
    return soft


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("iterations", [1, 5])
def test_equals_a_plain_loop(temperature: float, iterations: int) -> None:
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    soft = sinkhorn(logits, temperature, iterations)
    for block in range(3):
        expected = plain_sinkhorn(logits[block].numpy(), temperature, iterations)
        np.testing.assert_allclose(soft[block].numpy(), expected, rtol=1e-9)


def test_without_iterations_rows_sum_to_one() -> None:
    soft = sinkhorn(torch.randn(2, 8, 8), 1.0, 0)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 8))


def test_becomes_doubly_stochastic() -> None:
    soft = sinkhorn(torch.randn(4, 16, 16), 1.0, 50)
    torch.testing.assert_close(soft.sum(-1), torch.ones(4, 16))
    torch.testing.assert_close(soft.sum(-2), torch.ones(4, 16))


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits_give_no_nan(size: float) -> None:
    logits = (torch.randn(4, 64, 64) * size).requires_grad_()
    soft = sinkhorn(logits, 0.1, 5)
    (soft * torch.randn_like(soft)).sum().backward()
    assert soft.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@settings(max_examples=40)
@given(st.integers(0, 2**31), st.sampled_from([2, 4, 5]))
def test_hard_permutation_is_the_best_one(seed: int, size: int) -> None:
    soft = torch.rand(2, size, size, generator=torch.Generator().manual_seed(seed))
    order = harden(soft)
    for block in range(2):
        best = max(
            sum(float(soft[block, channel, j]) for j, channel in enumerate(candidate))
            for candidate in permutations(range(size))
        )
        assert sorted(order[block].tolist()) == list(range(size))
        found = sum(float(soft[block, channel, j]) for j, channel in enumerate(order[block]))
        assert found == pytest.approx(best)


def test_hardening_a_permutation_returns_it() -> None:
    order = torch.stack([torch.randperm(32) for _ in range(5)])
    matrix = torch.nn.functional.one_hot(order).transpose(1, 2).float()
    assert torch.equal(harden(matrix), order)
