"""Rows say what the machine was like, and fragmented memory is named before it flatters."""

from collections.abc import Iterator

import pytest
from rich.console import Console

from benchmarks.cpu import conditions


@pytest.fixture(autouse=True)
def ask_anew() -> Iterator[None]:
    conditions.small_pages_at_start.cache_clear()
    yield
    conditions.small_pages_at_start.cache_clear()


def test_a_run_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([0.25, 0.75])
    monkeypatch.setattr(conditions, "share", lambda: next(found))
    assert [conditions.conditions()["small_pages"] for _ in range(2)] == [0.25, 0.25]
    assert conditions.conditions()["load_average"] >= 0


@pytest.mark.parametrize(("found", "warned"), [(0.1, True), (0.79, True), (0.8, False), (1, False)])
def test_fragmented_memory_is_named_before_it_flatters(
    found: float, warned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditions, "share", lambda: found)
    console = Console(record=True, width=400)
    conditions.warn(console)
    said = console.export_text()
    assert (f"memory is fragmented: small pages are read at {found:.0%}" in said) is warned
    assert ("benchmarks.cpu.fragmentation --hold" in said) is warned
