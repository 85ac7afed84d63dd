"""Int4 grids: against a search in plain loops, and the properties that packing relies on."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.sparsity.int4_values import GROUP, MOST, Int4Grid, choose_grid
from permllm_offline.sparsity.int8_values import round_to_int8
from tests.offline.sparsity.test_int8_values import masked_weight, row_error


def fits_four_bits(integers: list[int]) -> bool:
    """Whether they are -8 to 7 times something: what csrc/cpu/packing/four_bits.h asks."""
    step = math.gcd(*integers)
    return step == 0 or all(-8 * step <= value <= 7 * step for value in integers)


@pytest.mark.parametrize("columns", [64, 128, 200])
@pytest.mark.parametrize("energetic", [False, True])
def test_every_group_has_nearly_the_step_of_least_error(columns: int, energetic: bool) -> None:
    """A step of the group's own, found in plain loops, is at most a tenth better."""
    weight = masked_weight(0, 4, columns, torch.float32)
    energy = torch.rand(columns, generator=torch.Generator().manual_seed(1)) ** 2
    energy = energy if energetic else torch.ones(columns)
    grid = choose_grid(weight, energy)
    assert grid.multipliers.shape == (4, -(-columns // GROUP))
    assert 1 <= grid.multipliers.min() <= grid.multipliers.max() <= MOST
    total = least = 0.0
    for row, scale, multipliers in zip(weight, grid.scale, grid.multipliers, strict=True):
        for index, multiplier in enumerate(multipliers.tolist()):
            group = row[index * GROUP : (index + 1) * GROUP].tolist()
            own = energy[index * GROUP : (index + 1) * GROUP].tolist()
            largest = max(map(abs, group))
            tried = [largest / 7.5 * clip / 100 for clip in range(50, 116, 2)]
            least += min(row_error(group, own, step, (-8, 7)) for step in tried)
            total += row_error(group, own, float(scale) * multiplier, (-8, 7))
    assert total <= 1.1 * least


@given(
    seed=st.integers(0, 2**16),
    columns=st.sampled_from([8, 64, 72, 192]),
    magnitude=st.sampled_from([1e-6, 1e-2, 1.0, 300.0]),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_integers_fit_four_bits_and_are_found_again(
    seed: int, columns: int, magnitude: float, dtype: torch.dtype
) -> None:
    weight = (masked_weight(seed, 3, columns, torch.float32) * magnitude).to(dtype)
    grid = choose_grid(weight, torch.ones(columns))
    integers = grid.integers(weight)
    assert not integers[weight == 0].any()
    for row in integers.int():
        assert all(fits_four_bits(group.tolist()) for group in row.split(GROUP))
    if dtype != torch.float16 or magnitude >= 1e-2:  # below, float16 has no steps for them
        again = (integers * grid.scale[:, None]).to(dtype)
        assert torch.equal(round_to_int8(again, grid.scale), integers.to(torch.int8))
        assert torch.equal(grid.integers(again), integers)


def test_rows_and_groups_of_zeros() -> None:
    weight = masked_weight(0, 3, 128, torch.float32)
    weight[0] = 0
    weight[1, :GROUP] = 0
    grid = choose_grid(weight, torch.ones(128))
    assert grid.scale.isfinite().all()
    assert (grid.scale > 0).all()
    assert not grid.integers(weight)[weight == 0].any()
    assert grid.integers(weight)[2].any()


def test_kept_weights_alone_are_rounded_as_all_are() -> None:
    weight = masked_weight(3, 5, 128, torch.float32)
    mask = torch.zeros(5, 128, dtype=torch.bool)
    mask[:, 0::4] = mask[:, 1::4] = True
    weight *= mask
    grid = choose_grid(weight, torch.ones(128))
    kept = weight[mask].view(5, -1)
    expected = grid.integers(weight)[mask].view(5, -1)
    assert torch.equal(replace(grid, group=GROUP // 2).integers(kept), expected)


def test_some_rows() -> None:
    weight: Tensor = masked_weight(4, 6, 128, torch.float32)
    grid: Int4Grid = choose_grid(weight, torch.ones(128))
    rows = slice(2, 5)
    assert torch.equal(grid.integers(weight[rows], rows=rows), grid.integers(weight)[rows])
