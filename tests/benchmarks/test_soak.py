"""The verdict of a soak: what counts as a failure."""

import time
from dataclasses import replace

import psutil
import pytest

from benchmarks.engines import memory as memory_module
from benchmarks.engines.memory import Memory
from benchmarks.engines.traffic import Tally
from benchmarks.soak import IDLE, LARGEST_GROWTH_MIB, Soaked, percentiles, summary


def good() -> Soaked:
    tally = Tally(completed=30, cancelled=5, refused=6, compared=30, tokens=300)
    memory = Memory([500.0 + 40 * i for i in range(8)] + [900.0] * 12)
    return Soaked("float32", "backend cpu", 10.0, tally, memory, dict.fromkeys(IDLE, 0.0))


def test_a_good_run_has_no_failures() -> None:
    assert good().failures() == []
    line = summary([good(), replace(good(), dtype="bfloat16")])
    assert line.endswith(": passed")
    assert "float32 41 requests (30 completed, 5 cancelled, 6 refused), 0 errors" in line
    record = good().to_dict()
    assert (record["requests"], record["tokens_per_second"]) == (41, 30.0)
    assert (record["resident_mib_warm"], record["resident_mib_growth"]) == (900.0, 0.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"errors": ["complete: status 500"]}, "error: complete: status 500"),
        ({"wrong": ["3 tokens"]}, "wrong answer: 3 tokens"),
        ({"compared": 29}, "1 answers were not compared"),
        ({"completed": 0, "compared": 0}, "no request was completed"),
        ({"cancelled": 0}, "no request was cancelled"),
        ({"refused": 0}, "no request was refused"),
    ],
)
def test_what_came_back_is_judged(changes: dict, message: str) -> None:
    record = replace(good(), tally=replace(good().tally, **changes))
    assert record.failures() == [message]
    assert summary([good(), record]).endswith(": 1 failures")


def test_bfloat16_answers_need_not_be_compared() -> None:
    tally = replace(good().tally, compared=0)
    assert replace(good(), dtype="bfloat16", tally=tally).failures() == []


@pytest.mark.parametrize("line", ["", "PermLLM 0.1.0: backend reference (pytorch) serves 120"])
def test_bfloat16_must_be_served_by_a_kernel(line: str) -> None:
    (failure,) = replace(good(), dtype="bfloat16", backend=line).failures()
    assert failure.startswith("no compiled kernel served")
    assert replace(good(), backend=line).failures() == []


def test_growth_after_warming_up_is_a_failure() -> None:
    grown = Memory([100.0] * 8 + [900.0] * 6 + [900.0 + LARGEST_GROWTH_MIB + 1] * 6)
    (failure,) = replace(good(), memory=grown).failures()
    assert failure.startswith("memory grew from 900 to 965 MiB")


@pytest.mark.parametrize("name", IDLE)
def test_a_server_that_does_not_come_to_rest_is_a_failure(name: str) -> None:
    (failure,) = replace(good(), metrics={**good().metrics, name: 2.0}).failures()
    assert failure.startswith(f"{name} is 2.0")
    missing = {key: 0.0 for key in IDLE if key != name}
    assert len(replace(good(), metrics=missing).failures()) == 1


def test_percentiles() -> None:
    assert percentiles([]) == {}
    assert percentiles([float(i) for i in range(101)]) == {"p50": 50.0, "p95": 95.0, "max": 100.0}


def test_memory_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_module, "SAMPLE_SECONDS", 0.01)
    with memory_module.watched(psutil.Process()) as memory:
        while len(memory.samples) < 2:
            time.sleep(0.01)
    assert min(memory.samples) > 10
