"""What the studies compute themselves, against plain loops."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.studies.rounding import LARGEST_INT8, by_range, rounded
from benchmarks.studies.swapping import Block, Gain, swaps
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN = Pattern(2, 4)


def rounded_by_loops(
    weight: list[list[float]], order: list[int], group: int, largest: int
) -> list[list[float]]:
    result = [[0.0] * len(order) for _ in weight]
    for row, values in enumerate(weight):
        for start in range(0, len(order), group):
            channels = order[start : start + group]
            step = max(abs(values[channel]) for channel in channels) / largest
            for channel in channels:
                result[row][channel] = round(values[channel] / step) * step if step else 0.0
    return result


@given(st.integers(0, 2**31), st.sampled_from([(8, 4), (12, 8), (6, 6)]), st.sampled_from([7, 127]))
def test_rounding_follows_the_order(seed: int, sizes: tuple[int, int], largest: int) -> None:
    channels, group = sizes
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((3, channels), generator=generator, dtype=torch.float64).float()
    weight[0, : channels // 2] = 0
    order = torch.randperm(channels, generator=generator)
    expected = rounded_by_loops(weight.tolist(), order.tolist(), group, largest)
    torch.testing.assert_close(rounded(weight, order, group, largest), torch.tensor(expected))


@given(st.integers(0, 2**31))
def test_no_order_changes_values_with_one_scale_for_a_row(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn((4, 128), generator=generator)
    order = torch.randperm(128, generator=generator)
    plain = rounded(weight, torch.arange(128), 128, LARGEST_INT8)
    assert torch.equal(rounded(weight, order, 128, LARGEST_INT8), plain)
    # Groups are what an order changes.
    assert not torch.equal(rounded(weight, order, 32), rounded(weight, torch.arange(128), 32))


def test_no_order_inside_blocks_changes_groups_of_whole_blocks() -> None:
    weight = torch.randn(4, 128, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.randperm(64), 64 + torch.randperm(64)])
    for group in (64, 128):
        plain = rounded(weight, torch.arange(128), group)
        assert torch.equal(rounded(weight, order, group), plain)


def test_channels_are_sorted_by_range_in_runs_and_blocks() -> None:
    channel_range = torch.tensor([5.0, 1.0, 2.0, 4.0, 0.0, 9.0, 3.0, 7.0])
    assert by_range(channel_range, 1, 8).tolist() == [4, 1, 2, 6, 3, 0, 7, 5]
    assert by_range(channel_range, 1, 4).tolist() == [1, 2, 3, 0, 4, 6, 7, 5]
    assert by_range(channel_range, 2, 8).tolist() == [2, 3, 0, 1, 6, 7, 4, 5]


def test_swaps_are_all_exchanges_of_two_groups() -> None:
    found = {tuple(row) for row in swaps(4).tolist()}
    plain = tuple(range(8))
    expected = {plain}
    for first, second in itertools.product(range(4), range(4, 8)):
        row = list(plain)
        row[first], row[second] = second, first
        expected.add(tuple(row))
    assert found == expected
    assert swaps(4)[0].tolist() == list(plain)


def kept_by_loops(importance: torch.Tensor, order: list[int]) -> torch.Tensor:
    mask = torch.zeros_like(importance, dtype=torch.bool)
    for row in range(len(importance)):
        for start in range(0, len(order), 4):
            group = order[start : start + 4]
            best = sorted(group, key=lambda channel: -float(importance[row, channel]))[:2]
            mask[row, best] = True
    return mask


def objectives(block: tuple[torch.Tensor, ...], order: list[int]) -> tuple[float, float]:
    """Score that is kept, and loss with its sign turned: both are better when larger."""
    weight, importance, moment = block
    mask = kept_by_loops(importance, order)
    lost = (weight * ~mask).double()
    return float(importance[mask].sum()), -float((lost @ moment.double() @ lost.t()).trace())


@pytest.fixture
def parts() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((6, 16), generator=generator)
    inputs = torch.randn((40, 16), generator=generator) @ torch.randn((16, 16), generator=generator)
    return weight, weight.abs() * inputs.norm(dim=0), inputs.t() @ inputs


@pytest.mark.parametrize("objective", [0, 1], ids=["score", "loss"])
def test_a_search_ends_where_no_swap_gains(objective: int, parts: tuple[torch.Tensor, ...]) -> None:
    start = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    block = Block(*parts, start, PATTERN)
    gain: Gain = block.loss_gain if objective else block.score_gain
    order = block.improve(gain, sweeps=50).tolist()
    assert sorted(order) == list(range(16))
    reached = objectives(parts, order)[objective]
    assert reached > objectives(parts, start.tolist())[objective]
    for first, second in itertools.combinations(range(16), 2):
        other = list(order)
        other[first], other[second] = other[second], other[first]
        assert objectives(parts, other)[objective] <= reached + 1e-4 * abs(reached)


def test_gains_are_the_differences_of_the_objectives(parts: tuple[torch.Tensor, ...]) -> None:
    start = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    block = Block(*parts, start, PATTERN)
    channels = start[4:12]  # of the second and the third group
    before = objectives(parts, start.tolist())
    for swap in swaps(4):
        order = torch.cat([start[:4], channels[swap], start[12:]]).tolist()
        keeps = kept_by_loops(parts[1], order)[:, channels].t()[None]
        score, loss = objectives(parts, order)
        assert float(block.loss_gain(channels, keeps)) == pytest.approx(
            loss - before[1], abs=1e-3 * abs(before[1])
        )
        plain = kept_by_loops(parts[1], start.tolist())[:, channels].t()[None]
        gained = block.score_gain(channels, keeps) - block.score_gain(channels, plain)
        assert float(gained) == pytest.approx(score - before[0], abs=1e-3)
