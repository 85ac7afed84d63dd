"""Scattered pages are measured, and taken out of the way."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cpu import fragmentation

SIZE = 8 << 20
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def huge_pages_mib() -> float:
    """What this process has in huge pages, by the kernel."""
    found = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert found is not None
    return int(found[1]) / 1024


@pytest.fixture(autouse=True)
def small_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fragmentation, "SAMPLE", SIZE)


def test_small_pages_are_zeros_in_no_huge_page() -> None:
    before = huge_pages_mib()
    memory = fragmentation.small_pages(SIZE)
    assert len(memory) == SIZE
    assert not memory.any()
    assert huge_pages_mib() == before


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="huge pages are off here"
)
def test_huge_pages_are_huge() -> None:
    before = huge_pages_mib()
    memory = fragmentation.huge_pages(64 << 20)
    assert huge_pages_mib() - before > len(memory) / 2 / 2**20


def test_the_best_reading_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 4.0, 0.0, 2.0, 0.0, 8.0])
    monkeypatch.setattr(fragmentation.time, "thread_time", lambda: next(seconds))
    assert fragmentation.rate(torch.zeros(4 << 20, dtype=torch.uint8)) == (4 << 20) / 2.0 / 1e6


@pytest.mark.parametrize(
    ("rates", "most", "taken", "share"),
    [
        ([950], 10, 0, 0.95),
        ([100, 100, 900, 1], 10, 2, 0.9),
        ([100, 100, 100, 1000], 2, 2, 0.1),
    ],
)
def test_scattered_pages_are_held_until_fresh_ones_are_fast(
    rates: list[float], most: int, taken: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fragmentation, "rate", lambda memory: 1000.0)
    given: list[Tensor] = []
    left = iter(rates)

    def allocate(size: int) -> Tensor:
        given.append(torch.zeros(size, dtype=torch.uint8))
        return given[-1]

    held, found = fragmentation.hold(most * SIZE, allocate, lambda memory: next(left))
    assert [id(memory) for memory in held] == [id(memory) for memory in given[:taken]]
    assert found == pytest.approx(share)
