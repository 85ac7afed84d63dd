"""Learned steps of int4 values: their gradient in plain loops, and the grids that they leave."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.reconstruction.learned_steps import RATE, LearnedSteps
from permllm_offline.sparsity.int4_values import GROUP, MOST, Int4Grid, choose_grid, with_steps

BETAS, EPSILON = (0.9, 0.95), 1e-12
KEPT, CHANNELS = 8, 16
"""Kept weights of a row and a group, whose channels are two groups'."""


def kept_rows(seed: int, rows: int = 5) -> tuple[Tensor, Tensor, Tensor, Int4Grid]:
    """Weights, their channels, gradients, and a smoothed grid that clips some of them."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 2 * KEPT, generator=generator)
    channels = torch.arange(2 * CHANNELS).view(-1, 2)[:, 0].expand(rows, -1)
    gradient = torch.randn(rows, 2 * KEPT, generator=generator)
    exponents = torch.randint(-2, 3, (2 * CHANNELS,), generator=generator, dtype=torch.int8)
    multipliers = torch.randint(3, MOST, (rows, 2), generator=generator, dtype=torch.uint8)
    scale = 0.01 + 0.03 * torch.rand(rows, generator=generator)
    return weight, channels, gradient, Int4Grid(scale, multipliers, KEPT, exponents)


def slope(weight: float, power: float, step: float) -> float:
    """What the rounded weight gains as the logarithm of its step grows, straight-through."""
    quotient = weight * power / step
    if quotient > 7.5:
        return 7 * step / power
    if quotient < -8.5:
        return -8 * step / power
    return round(quotient) * step / power - weight


@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_the_one_of_plain_loops(seed: int) -> None:
    weight, channels, gradient, grid = kept_rows(seed)
    learned = LearnedSteps(grid, BETAS, EPSILON, torch.device("cpu"))
    before = grid.steps()
    expected = torch.zeros(5, 2)
    clipped = 0
    for row in range(5):
        for i in range(2 * KEPT):
            power = 2.0 ** int(grid.exponents[channels[row, i]])  # type: ignore[index]
            step = float(before[row, i // KEPT])
            one = float(weight[row, i])
            clipped += not -8.5 <= one * power / step <= 7.5
            expected[row, i // KEPT] += float(gradient[row, i]) * slope(one, power, step)
    assert 0 < clipped < weight.numel()
    found = learned._gradient(weight, channels, gradient)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    # Adam's first step is the sign of the gradient, whatever its size.
    learned.step(weight, channels, gradient, 1e-3)
    moved = before * torch.exp(-RATE * 1e-3 * expected.sign())
    nearest = with_steps(grid, moved)
    torch.testing.assert_close(learned.grid.scale, nearest.scale)
    assert torch.equal(learned.grid.multipliers, nearest.multipliers)


@given(seed=st.integers(0, 2**16), groups=st.integers(1, 5))
def test_steps_are_met_by_multipliers_within_half_of_the_scale(seed: int, groups: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(4, groups, generator=generator) + 0.01
    grid = with_steps(Int4Grid(torch.ones(4), torch.ones(4, groups, dtype=torch.uint8)), steps)
    assert grid.group == GROUP
    assert torch.equal(grid.multipliers.amax(1), torch.full((4,), MOST, dtype=torch.uint8))
    away = (grid.steps() - steps).abs()
    most = torch.maximum(grid.scale / 2, grid.scale - steps.amin(1))  # a multiplier is at least 1
    assert (away <= 1.001 * most[:, None]).all()


def test_steps_follow_a_loss_that_prefers_others() -> None:
    """Weights stay where they are; only steps that were chosen three times too large move."""
    weight = torch.randn(6, KEPT, generator=torch.Generator().manual_seed(0))
    channels = torch.arange(CHANNELS).view(-1, 2)[:, 0].expand(6, -1)
    chosen = choose_grid(weight, torch.ones(KEPT), KEPT)
    learned = LearnedSteps(with_steps(chosen, 3 * chosen.steps()), BETAS, EPSILON, weight.device)

    def error() -> float:
        return float((learned.grid.rounded(weight) - weight).square().sum())

    before = error()
    for _ in range(100):
        gradient = 2 * (learned.grid.rounded(weight, columns=channels) - weight)
        learned.step(weight, channels, gradient, 1e-3)
    assert error() < before / 3
    torch.testing.assert_close(learned.grid.steps(), chosen.steps(), rtol=0.4, atol=0)


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    weight, channels, gradient, grid = kept_rows(0)
    whole = LearnedSteps(grid, BETAS, EPSILON, weight.device)
    whole.step(weight, channels, gradient, 1e-3)
    whole.remember()
    whole.step(weight, channels, gradient, 1e-3)
    state = {name: tensor.clone() for name, tensor in whole.state().items()}
    resumed = LearnedSteps(grid, BETAS, EPSILON, weight.device)
    resumed.load_state(state)
    for steps in (whole, resumed):
        steps.step(weight, channels, -gradient, 1e-3)
    for mine, other in ((whole.grid, resumed.grid), (whole.best, resumed.best)):
        assert torch.equal(mine.scale, other.scale)
        assert torch.equal(mine.multipliers, other.multipliers)
