import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from permllm_offline.run.costs import Cost, costs_json
from permllm_offline.run.steps import Step, Work, WorkFolder


def test_steps_are_timed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.5, 20.0, 21.0])
    monkeypatch.setattr("permllm_offline.run.costs.time.perf_counter", lambda: next(clock))
    work = Work()
    work.step("one", Step)
    with work.measured("two"):
        pass
    assert [(cost.name, cost.seconds) for cost in work.costs] == [("one", 2.5), ("two", 1.0)]


def test_what_is_done_again_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, processor = iter([0.0, 1.0, 2.0, 6.0, 10.0, 11.5]), iter([0.0, 2.0, 5.0, 6.0, 7.0, 7.5])
    monkeypatch.setattr("permllm_offline.run.costs.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("permllm_offline.run.costs.time.process_time", lambda: next(processor))
    work = Work()
    for name in ("passes", "layer-0000", "passes"):
        with work.measured(name):
            pass
    found = [(cost.name, cost.seconds, cost.processor_seconds) for cost in work.costs]
    assert found == [("passes", 2.5, 2.5), ("layer-0000", 4.0, 1.0)]


def test_a_resumed_step_costs_what_it_cost(tmp_path: Path) -> None:
    first = WorkFolder(tmp_path / "work", "a")
    first.begin()
    first.step("one", Step)
    with first.measured("passes"):
        pass
    first.step("two", Step)
    first.release()
    again = WorkFolder(tmp_path / "work", "a")
    again.begin()
    again.step("one", Step)
    again.read("two")
    assert again.costs == first.costs
    assert [cost.name for cost in first.costs] == ["one", "passes", "two"]
    again.release()
    anew = WorkFolder(tmp_path / "work", "b", restart=True)
    anew.begin()
    assert anew.costs == []


def test_what_an_unfinished_step_took_is_added_to_the_rest_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 100.0, 102.0])  # killed between 5 and 100
    time = SimpleNamespace(perf_counter=lambda: next(clock), process_time=lambda: 0.0)
    monkeypatch.setattr("permllm_offline.run.costs.time", time)
    first = WorkFolder(tmp_path / "work", "a")
    first.begin()

    def killed() -> Step:
        first.keep_interval("one", Step())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        first.step("one", killed)
    first.release()
    again = WorkFolder(tmp_path / "work", "a")
    again.begin()
    assert again.interval("one") is not None
    again.step("one", Step)
    assert [(cost.name, cost.seconds) for cost in again.costs] == [("one", 7.0)]


GROWTH = """
import torch
from permllm_offline.run.costs import peak_bytes
before = peak_bytes()
held = torch.ones(1 << 28, dtype=torch.uint8)
print(before, peak_bytes())
"""


def test_memory_grows_with_what_is_held() -> None:
    """In a process of its own: that of the tests may have held more before."""
    command = [sys.executable, "-c", GROWTH]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    before, after = map(int, found.split())
    assert 1 << 24 < before < 1 << 40
    assert 0.9 * (1 << 28) < after - before < 1.5 * (1 << 28)


def test_json() -> None:
    costs = [Cost("one", 1.5, 100, 3.0), Cost("two", 2.0, None, 0.5)]
    assert json.loads(costs_json(costs)) == {
        "seconds": 3.5,
        "processor_seconds": 3.5,
        "peak_bytes": 100,
        "steps": [
            {"name": "one", "seconds": 1.5, "peak_bytes": 100, "processor_seconds": 3.0},
            {"name": "two", "seconds": 2.0, "peak_bytes": None, "processor_seconds": 0.5},
        ],
    }
    nothing = {"seconds": 0, "processor_seconds": 0, "peak_bytes": None, "steps": []}
    assert json.loads(costs_json([])) == nothing
