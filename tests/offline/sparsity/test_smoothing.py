"""Exponents of smoothed inputs: against a search in plain loops, and what they are worth."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.model.families import FAMILIES
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.sparsity.int4_values import choose_grid
from permllm_offline.sparsity.int8_values import Int8Grid, choose_scale
from permllm_offline.sparsity.smoothing import (
    LARGEST_EXPONENT,
    PEAK,
    STRENGTHS,
    choose_exponents,
    multiplied,
)


def uneven(seed: int, channels: int, spread: float) -> tuple[Tensor, Tensor]:
    """Weights of 24 outputs, half of them zero, and the energies of their inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, channels, generator=generator)
    weight *= torch.rand(weight.shape, generator=generator) > 0.5
    energy = torch.exp2(spread * torch.randn(channels, generator=generator))
    return weight, energy


def noise_in_loops(
    weight: Tensor, energy: Tensor, exponents: Tensor, group: int, top: int
) -> float:
    """Expected squared error of all outputs, from both roundings, but for the twelfth of each."""
    rows, channels = weight.shape
    factors = [2.0**exponent for exponent in exponents.tolist()]
    met = [float(energy[j]) / factors[j] ** 2 for j in range(channels)]
    scaled = [[float(weight[i, j]) * factors[j] for j in range(channels)] for i in range(rows)]
    of_weights = of_inputs = 0.0
    for row in scaled:
        for first in range(0, channels, group):
            part = range(first, min(first + group, channels))
            step = max(abs(row[j]) for j in part) / top
            of_weights += step**2 * sum(met[j] for j in part)
        of_inputs += PEAK * max(met) / 127**2 * sum(value**2 for value in row)
    return of_weights + of_inputs


@pytest.mark.parametrize(("values", "group", "top"), [("int8", 96, 127), ("int4", 64, 7.5)])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_no_strength_tried_in_plain_loops_has_less_noise(
    values: str, group: int, top: int, spread: float
) -> None:
    weight, energy = uneven(0, 96, spread)
    found = choose_exponents([weight[:10], weight[10:]], energy, values)
    assert found.dtype == torch.int8
    levels = (energy.log2() / 2 - energy.log2().mean() / 2).tolist()
    tried = [
        torch.tensor([max(-8, min(8, round(strength * level))) for level in levels])
        for strength in STRENGTHS
    ]
    noises = [noise_in_loops(weight, energy, one, group, top) for one in tried]
    assert noise_in_loops(weight, energy, found, group, top) <= min(noises) * (1 + 1e-5)
    assert noises[0] > 1.1 * min(noises) or spread < 1


@pytest.mark.parametrize(("values", "gain"), [("int8", 3.0), ("int4", 1.1)])
def test_outputs_of_rounded_inputs_and_weights_are_closer(values: str, gain: float) -> None:
    """As kernels compute them: each token rounded with one step, which its largest input sets."""
    weight, energy = uneven(1, 256, 2.0)
    energy[7] *= 1000  # an outlier channel
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(64, 256, generator=generator) * energy.sqrt()
    exact = inputs @ weight.T

    def error(exponents: Tensor) -> float:
        met = inputs * torch.exp2(-exponents.float())
        steps = met.abs().amax(1, keepdim=True) / 127
        columns, seen = multiplied(weight, exponents), energy * torch.exp2(-2.0 * exponents)
        rounded = (
            choose_grid(columns, seen).rounded(columns)
            if values == "int4"
            else Int8Grid(choose_scale(columns, seen)).rounded(columns)
        )
        return float(((met / steps).round() * steps @ rounded.T - exact).square().sum())

    smoothed = error(choose_exponents([weight], energy, values))
    assert smoothed < error(torch.zeros(256, dtype=torch.int8)) / gain


@given(seed=st.integers(0, 2**16), spread=st.floats(0, 30))
def test_powers_of_two_round_nothing(seed: int, spread: float) -> None:
    weight, energy = uneven(seed, 48, spread)
    weight = weight.to(torch.bfloat16)
    exponents = choose_exponents([weight], energy, "int8")
    assert exponents.abs().max() <= LARGEST_EXPONENT
    there = multiplied(weight, exponents)
    assert torch.equal(multiplied(there, -exponents), weight.float())
    columns = torch.arange(48).expand(24, 48)[:, ::3]
    assert torch.equal(multiplied(weight[:, ::3], exponents, columns), there[:, ::3])
    assert torch.equal(multiplied(weight, None), weight.float())


def test_channels_that_are_always_zero_stay_as_they_are() -> None:
    weight, energy = uneven(3, 64, 4.0)
    energy[::5] = 0
    exponents = choose_exponents([weight], energy, "int8")
    assert exponents.any()
    assert not exponents[::5].any()
    assert not choose_exponents([weight], torch.zeros(64), "int8").any()
    assert not choose_exponents([weight], torch.ones(64), "int4").any()


def test_query_heads_of_one_value_head_stay_equal() -> None:
    layout = GroupLayout(FAMILIES["llama"].groups[1], 4 * 8, 8, Heads(4, 2, 8))
    energy = torch.rand(32)
    tied = layout.tied(energy).view(2, 2, 8)
    assert torch.equal(tied[:, 0], tied[:, 1])
    torch.testing.assert_close(tied[:, 0], energy.view(2, 2, 8).mean(1))
    down = GroupLayout(FAMILIES["llama"].groups[3], 32, 8, Heads(4, 2, 8))
    assert torch.equal(down.tied(energy), energy)
    assert [one.can_smooth for one in (layout, down)] == [True, True]
    assert not GroupLayout(FAMILIES["gemma"].groups[0], 32, 8, Heads(4, 2, 8)).can_smooth
