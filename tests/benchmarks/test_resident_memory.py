"""What is counted as growth of the resident memory."""

import pytest
import torch

from benchmarks.pruning.layer_step import LOOPS, measure_step
from benchmarks.resident_memory import ResidentGrowth

MIB = 1 << 20


def hold(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB, dtype=torch.uint8)


def test_what_was_held_before_neither_hides_growth_nor_counts() -> None:
    hold(64)
    kept = hold(48)
    growth = ResidentGrowth()
    first = growth.peak_bytes()
    if first is None:
        pytest.skip("this system does not let a process reset its peak")
    assert first < 8 * MIB
    hold(32)
    found = growth.peak_bytes()
    assert found is not None
    assert 28 * MIB < found < len(kept)


@pytest.mark.parametrize("loop", LOOPS)
def test_the_memory_of_a_step_shows_after_more_was_held(loop: str) -> None:
    """Building the layer holds more for a moment than a narrow layer's step takes."""
    hold(256)
    cost = measure_step(loop, 512, 16, 2)
    if cost.peak_mib is None:
        pytest.skip("this system does not let a process reset its peak")
    weight_mib = 512 * 512 * 2 / MIB
    assert weight_mib < cost.peak_mib < 128


def test_without_a_peak_that_can_be_reset_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr("benchmarks.resident_memory.CLEAR", tmp_path)  # a folder: not writable
    assert ResidentGrowth().peak_bytes() is None
    assert measure_step("ours", 128, 8, 1).peak_mib is None
