"""Int8 scales: against a search in plain loops, and the properties that baking relies on."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.sparsity.grid import relative_error
from permllm_offline.sparsity.int8_values import (
    CLIPS,
    Int8Grid,
    choose_scale,
    round_to_int8,
)


def masked_weight(seed: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    weight[:, 0] *= 6  # an outlier, which a clip may pay for
    keep = torch.rand(rows, columns, generator=generator) > 0.5
    keep[:, 0] = True
    return (weight * keep).to(dtype)


def row_error(
    row: list[float], energy: list[float], scale: float, limits: tuple[int, int] = (-128, 127)
) -> float:
    error = 0.0
    for value, weight in zip(row, energy, strict=True):
        rounded = max(limits[0], min(limits[1], round(value / scale)))
        error += weight * (value - scale * rounded) ** 2
    return error


@pytest.mark.parametrize("energetic", [False, True])
def test_no_worse_than_any_clip_tried_in_plain_loops(energetic: bool) -> None:
    weight = masked_weight(0, 6, 48, torch.float32)
    weight[:, 0] = 10.0
    energy = torch.ones(48)
    if energetic:
        energy = torch.rand(48, generator=torch.Generator().manual_seed(1)) ** 2
        energy[0] = 1e-4  # the outlier hardly matters to the output
    scale = choose_scale(weight, energy)
    for row, chosen in zip(weight.tolist(), scale.tolist(), strict=True):
        largest = max(abs(value) for value in row)
        clips = [row_error(row, energy.tolist(), largest * clip / 127) for clip in CLIPS]
        found = row_error(row, energy.tolist(), chosen)
        assert found <= min(clips) * (1 + 1e-4)
        if energetic:
            assert found < 0.9 * row_error(row, energy.tolist(), largest / 127)


@given(
    seed=st.integers(0, 2**16),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_rounded_weights_give_the_same_integers_again(
    seed: int, magnitude: float, dtype: torch.dtype
) -> None:
    if dtype == torch.float16:
        magnitude = max(magnitude, 1e-2)  # below, float16 itself has fewer than 8 bits
    weight = masked_weight(seed, 4, 32, torch.float32).mul(magnitude).to(dtype)
    scale = choose_scale(weight, torch.ones(32))
    integers = round_to_int8(weight, scale)
    again = (integers.float() * scale[:, None]).to(dtype)
    assert torch.equal(round_to_int8(again, scale), integers)
    assert not integers[weight == 0].any()


def test_a_row_of_zeros_has_scale_one() -> None:
    weight = torch.zeros(2, 8)
    weight[1, 3] = -2.0
    scale = choose_scale(weight, torch.ones(8))
    assert scale[0] == 1.0
    restored = float(round_to_int8(weight, scale)[1, 3] * scale[1])
    assert math.isclose(restored, -2.0, rel_tol=1e-6)


def test_relative_error_is_that_of_the_output() -> None:
    weight = masked_weight(3, 16, 64, torch.float32)
    energy = torch.rand(64, generator=torch.Generator().manual_seed(4)) + 0.1
    scale = choose_scale(weight, energy)
    inputs = torch.randn(20000, 64, generator=torch.Generator().manual_seed(5)) * energy.sqrt()
    exact = inputs @ weight.T
    rounded = inputs @ (round_to_int8(weight, scale).float() * scale[:, None]).T
    measured = float((rounded - exact).norm() / exact.norm())
    assert math.isclose(relative_error(weight, energy, Int8Grid(scale)), measured, rel_tol=0.02)
    assert measured < 0.02
