from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm_offline.permutation.hardening import Hardener, harden, prove_best, solve


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


def soft_blocks(seed: int) -> Tensor:
    """Blocks whose columns fight over their channels."""
    return torch.rand(6, 16, 16, generator=torch.Generator().manual_seed(seed))


def total(soft: Tensor, order: Tensor) -> Tensor:
    """trace(P^T soft) of each block."""
    return soft.gather(1, order[:, None, :]).sum((1, 2))


def best_total(soft: Tensor) -> list[float]:
    totals = []
    for block in soft.numpy():
        rows, columns = linear_sum_assignment(block, maximize=True)
        totals.append(float(block[rows, columns].sum()))
    return totals


def test_blocks_that_do_not_change_are_not_solved_again() -> None:
    soft, hardener = soft_blocks(0), Hardener()
    order = hardener(soft)
    assert hardener.solved == len(soft)
    assert torch.equal(hardener(soft), order)
    assert hardener.solved == len(soft)
    soft[2] = soft_blocks(1)[2]
    assert total(soft, hardener(soft)).tolist() == pytest.approx(best_total(soft), rel=1e-5)
    assert hardener.solved == len(soft) + 1


def test_blocks_whose_columns_agree_are_never_solved() -> None:
    hardener = Hardener()
    soft = torch.eye(16)[torch.randperm(16)].expand(3, -1, -1)
    hardener(soft)
    assert hardener.solved == 0


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1e-2, 1e-1]))
def test_every_step_ends_at_the_best_permutation(seed: int, step: float) -> None:
    soft, hardener = soft_blocks(seed), Hardener()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(5):
        assert total(soft, hardener(soft)).tolist() == pytest.approx(best_total(soft), rel=1e-5)
        soft = soft + step * torch.randn(soft.shape, generator=generator)


def test_small_steps_need_few_solutions() -> None:
    # A single run can meet several near ties; on average few blocks are solved a second time.
    solved, steps, runs, blocks = 0, 5, 20, len(soft_blocks(0))
    for seed in range(runs):
        soft, hardener = soft_blocks(seed), Hardener()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            hardener(soft)
            soft = soft + 1e-4 * torch.randn(soft.shape, generator=generator)
        solved += hardener.solved
    assert solved < 2 * runs * blocks < steps * runs * blocks


def test_nothing_but_the_best_is_proven() -> None:
    soft = soft_blocks(3)
    best = solve(soft)
    proven, potentials = prove_best(soft, best, torch.zeros(soft.shape[:2]))
    assert proven.any()
    assert prove_best(soft, best, potentials)[0].all()
    worse = best.clone()
    worse[:, :2] = best[:, [1, 0]]
    assert not prove_best(soft, worse, potentials)[0].any()
