"""Optimal Brain Surgeon against plain loops and least squares."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.reconstruction import obs
from permllm_offline.reconstruction.obs import (
    DAMPING,
    FACTOR_BYTES,
    inverse_factor_,
    least_damage,
    update_columns,
)
from permllm_offline.sparsity.mask import keep_channels
from permllm_vllm.checkpoint.pattern import Pattern
from tests.resident_memory import ResidentGrowth

PATTERNS = [Pattern(2, 4), Pattern(4, 8)]


def layer(rows: int = 5, channels: int = 32, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """A weight, and the second moment of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(channels) + 0.3 * torch.randn(channels, channels, generator=generator)
    inputs = torch.randn(tokens, channels, generator=generator) @ mixing
    return torch.randn(rows, channels, generator=generator), inputs.t() @ inputs


def inverse_factor(moment: Tensor, damping: float = DAMPING) -> Tensor:
    factor = moment.clone()
    inverse_factor_(factor, damping)
    return factor


def half(weight: Tensor, pattern: Pattern) -> Tensor:
    return keep_channels(weight.abs().t().contiguous(), pattern).t()


def loss(weight: Tensor, dense: Tensor, moment: Tensor) -> Tensor:
    """Squared output error of every row."""
    difference = (weight - dense).double()
    return ((difference @ moment.double()) * difference).sum(1)


def least_squares(dense: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """The best weights under a mask, row by row, from the normal equations."""
    best = torch.zeros_like(dense, dtype=torch.float64)
    moment = moment.double()
    for row, kept in enumerate(mask):
        target = (moment @ dense[row].double())[kept]
        best[row, kept] = torch.linalg.solve(moment[kept][:, kept], target)
    return best


def surgeon(dense: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """Each row alone, each column in turn, with the inverse of what is left computed afresh."""
    weight, moment = dense.double().clone(), moment.double()
    for column in range(dense.shape[1]):
        inverse = torch.linalg.inv(moment[column:, column:])
        for row in (~mask[:, column]).nonzero().flatten().tolist():
            weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
            weight[row, column] = 0
    return weight


def choosing_surgeon(dense: Tensor, moment: Tensor, pattern: Pattern) -> tuple[Tensor, Tensor]:
    """The surgeon that prunes, of each group as it comes to it, what costs least."""
    weight, moment = dense.double().clone(), moment.double()
    mask = torch.ones_like(dense, dtype=torch.bool)
    for start in range(0, dense.shape[1], pattern.group):
        columns = range(start, start + pattern.group)
        inverses = {column: torch.linalg.inv(moment[column:, column:]) for column in columns}
        for row in range(dense.shape[0]):
            cost = {c: weight[row, c] ** 2 / inverses[c][0, 0] for c in columns}
            pruned = sorted(columns, key=lambda c: cost[c])[: pattern.group - pattern.kept]
            for column in sorted(pruned):
                inverse = inverses[column]
                weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
                weight[row, column], mask[row, column] = 0, False
    return weight, mask


def test_the_factor_squares_to_the_inverse() -> None:
    _, moment = layer()
    factor = inverse_factor(moment, damping=0.0).double()
    torch.testing.assert_close(
        factor.t() @ factor, torch.linalg.inv(moment.double()), rtol=1e-4, atol=1e-7
    )
    assert torch.equal(factor, factor.triu())


def growth_of_a_factor(channels: int) -> int | None:
    """Bytes by which the memory of this process grows at most beside the moment."""
    inverse_factor_(torch.eye(200))  # what LAPACK loads once
    moment = torch.eye(channels)
    growth = ResidentGrowth()
    inverse_factor_(moment)
    return growth.peak_bytes()


def test_the_factor_is_made_in_one_float64_matrix() -> None:
    channels = 3072  # beside which the buffers that MKL keeps for itself are small
    # Memory that this process has freed, and would use again, is no growth: another one measures.
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        peak = pool.submit(growth_of_a_factor, channels).result()
    if peak is None:
        pytest.skip("the system does not let a process reset its peak of memory")
    assert peak / channels**2 == pytest.approx(FACTOR_BYTES - 4, rel=0.15)


@pytest.mark.parametrize("columns_at_once", [8, 32])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_equals_the_surgeon_step_by_step(
    pattern: Pattern, columns_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(obs, "COLUMNS_AT_ONCE", columns_at_once)
    dense, moment = layer()
    mask = half(dense, pattern)
    factor = inverse_factor(moment, damping=0.0)
    updated, _ = update_columns(dense, mask, factor, None, pattern.group)
    torch.testing.assert_close(updated.double(), surgeon(dense, mask, moment), rtol=1e-3, atol=1e-4)
    assert not updated[~mask].any()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_lies_between_the_mask_alone_and_least_squares(pattern: Pattern) -> None:
    dense, moment = layer(rows=8, channels=256, tokens=600)
    mask = half(dense, pattern)
    updated, _ = update_columns(dense, mask, inverse_factor(moment), None, pattern.group)
    before, after = loss(dense * mask, dense, moment), loss(updated, dense, moment)
    best = loss(least_squares(dense, mask, moment), dense, moment)
    # A single row may lose: a weight that took something over can be pruned after all.
    assert after.sum() < before.sum()
    assert (best <= after * (1 + 1e-6)).all()


def test_is_least_squares_where_pruned_columns_come_first() -> None:
    dense, moment = layer()
    mask = (torch.arange(32) >= 8).expand(dense.shape)
    updated, _ = update_columns(dense, mask, inverse_factor(moment, damping=0.0), None, 4)
    torch.testing.assert_close(
        updated.double(), least_squares(dense, mask, moment), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_its_own_masks_prune_what_costs_least(pattern: Pattern) -> None:
    dense, moment = layer()
    factor = inverse_factor(moment, damping=0.0)
    choose = least_damage(pattern, factor, moment.diagonal() == 0)
    updated, mask = update_columns(dense, None, factor, choose, pattern.group)
    expected, expected_mask = choosing_surgeon(dense, moment, pattern)
    assert torch.equal(mask, expected_mask)
    torch.testing.assert_close(updated.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_its_own_masks_keep_n_of_m_and_lose_less(pattern: Pattern) -> None:
    dense, moment = layer(rows=16, channels=64, tokens=400)
    factor = inverse_factor(moment)
    fixed, _ = update_columns(dense, half(dense, pattern), factor, None, pattern.group)
    choose = least_damage(pattern, factor, moment.diagonal() == 0)
    own, mask = update_columns(dense, None, factor, choose, pattern.group)
    assert (mask.unflatten(1, (-1, pattern.group)).sum(2) == pattern.kept).all()
    assert not own[~mask].any()
    assert loss(own, dense, moment).sum() < loss(fixed, dense, moment).sum()


def test_a_dead_channel_disturbs_nothing() -> None:
    dense, moment = layer()
    moment[3] = moment[:, 3] = 0
    mask = half(dense, PATTERNS[0])
    updated, _ = update_columns(dense, mask, inverse_factor(moment), None, 4)
    assert updated.isfinite().all()
    assert torch.equal(updated[:, 3], dense[:, 3] * mask[:, 3])


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_a_dead_channel_is_pruned_before_live_ones(pattern: Pattern) -> None:
    """Though one channel is so loud that the mean energy is far above that of the others."""
    dense, _ = layer(rows=64)
    inputs = torch.randn(500, 32, generator=torch.Generator().manual_seed(1))
    inputs[:, ::8], inputs[:, 1::8] = 0, 0
    inputs[:, 7] *= 30
    moment = inputs.t() @ inputs
    factor = inverse_factor(moment)
    updated, mask = update_columns(
        dense, None, factor, least_damage(pattern, factor, moment.diagonal() == 0), pattern.group
    )
    assert not mask[:, ::8].any()
    assert not mask[:, 1::8].any()
    assert updated.isfinite().all()


def test_a_singular_moment_is_damped_more(caplog: pytest.LogCaptureFixture) -> None:
    moment = torch.eye(8) * 1e-3
    moment[0, 1] = moment[1, 0] = 2e-3  # not positive definite
    assert inverse_factor(moment, damping=0.01).isfinite().all()
    assert "damping x 10" in caplog.text


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "not finite"), (1e6, "singular even with damping 10")]
)
def test_a_hopeless_moment_is_refused(value: float, message: str) -> None:
    moment = torch.eye(8)
    moment[0] = moment[:, 0] = value
    before = moment.clone()
    with pytest.raises(OfflineError, match=message):
        inverse_factor_(moment)
    torch.testing.assert_close(moment, before, rtol=0, atol=0, equal_nan=True)
