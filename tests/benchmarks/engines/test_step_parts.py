"""Time inside a worker's steps is sorted into parts, none of it twice."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.engines.step_parts import (
    BETWEEN,
    MODEL,
    PARTS,
    RUNNER,
    SAMPLING,
    SPARSE,
    Span,
    _time,
    by_step,
    part_of,
    watched,
)

STEP = [
    Span(RUNNER, 0, 10),
    Span(MODEL, 1, 9),
    Span("norms", 1, 2),
    Span("the plugin around its operator", 2, 6),
    Span(SPARSE, 3, 5),
    Span("norms", 6, 7),
    Span("output head", 9, 9.5),
    Span(SAMPLING, 10.5, 12),
]
"""Seconds: what encloses another part keeps the rest, of a step of 14."""
OWN = {
    SPARSE: 2, "the plugin around its operator": 2, "norms": 2, "output head": 0.5,
    SAMPLING: 1.5, MODEL: 2, RUNNER: 1.5, BETWEEN: 2.5,
}  # fmt: skip


def later(seconds: float) -> list[Span]:
    return [Span(span.part, span.start + seconds, span.stop + seconds) for span in STEP]


def test_every_second_of_a_step_is_in_one_part() -> None:
    finished_order = sorted([*STEP, *later(14), *later(30)], key=lambda span: span.stop)
    first, second = by_step(finished_order)  # the last has no end
    assert list(first) == list(PARTS)
    assert first == {**dict.fromkeys(PARTS, 0), **OWN}
    assert second == {**first, BETWEEN: 4.5}
    assert sum(second.values()) == 16
    assert by_step([]) == by_step(STEP) == []


def test_parts_that_touch_are_not_inside_each_other() -> None:
    spans = [Span(RUNNER, 0, 4), Span("norms", 0, 2), Span("norms", 2, 4), Span(RUNNER, 4, 5)]
    (found,) = by_step(spans)
    assert (found["norms"], found[RUNNER], found[BETWEEN]) == (4, 0, 0)


def test_a_watched_function_answers_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 3.0, 4.0, 10.0, 11.0, 12.0, 13.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    spans: list[Span] = []
    inner = SimpleNamespace(call=lambda x: 2 * x)
    runner: Any = SimpleNamespace(execute_model=lambda x: inner.call(x) + 1, watched_spans=spans)
    _time(inner, "call", SPARSE, spans)
    _time(runner, "execute_model", RUNNER, spans)
    assert [runner.execute_model(x) for x in (1, 2)] == [3, 5]
    worker = SimpleNamespace(model_runner=runner)
    (step,) = watched(worker)
    assert (step[SPARSE], step[RUNNER], step[BETWEEN]) == (2, 2, 6)
    assert watched(worker) == []


def test_modules_are_known_by_where_their_class_is_defined() -> None:
    def made(home: str, base: type = torch.nn.Module) -> type:
        return type("Made", (base,), {"__module__": home})

    layers = "vllm.model_executor.layers"
    norm = made(f"{layers}.layernorm")
    assert part_of(norm()) == "norms"
    assert part_of(made("elsewhere", norm)()) == "norms"
    assert part_of(made(f"{layers}.attention.attention")()) == "attention and KV cache"
    assert part_of(made(f"{layers}.attention_like")()) is None
    assert part_of(torch.nn.Linear(1, 1)) is None
