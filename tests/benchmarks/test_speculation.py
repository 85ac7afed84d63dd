"""What the benchmark of speculative decoding makes of engines."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import speculation
from benchmarks.engines.engine import Answers, EngineError
from benchmarks.engines.speculation_tables import ARBITRARY
from benchmarks.engines.speculation_tables import speculation as table
from benchmarks.engines.speculation_turns import DENSE, KEY, Case, compare
from benchmarks.records.rows import Rows
from benchmarks.speculation import prompts_of

INT8 = "vLLM int8 (W8A8)"
SPEEDS = {DENSE: 10.0, INT8: 20.0}
"""Tokens per second of a sequence, alone."""


class FakeEngine:
    """A step with a draft takes a tenth longer for each drafted token, and yields half of them."""

    def __init__(self, case: Case, log: list[Any]) -> None:
        self.case, self.log = case, log
        log.append(("start", case))

    def answers_to(self, prompts: Sequence[Sequence[int]], output: int) -> Answers:
        self.log.append((self.case, len(prompts)))
        yields = 1 + self.case.drafted / 2
        step = (1 + self.case.drafted / 10) / SPEEDS[self.case.target]
        return Answers(1.0, len(prompts) * yields / step, yields)

    def facts(self) -> dict[str, Any]:
        return {"resident_mib": 1000.0 + 500 * self.case.drafted, "threads": 1, "checkpoint": {}}

    def close(self) -> None:
        self.log.append(("close", self.case))


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def start(log: list[Any]) -> Any:
    def starting(case: Case) -> FakeEngine:
        if case.drafted == 9:
            raise EngineError("no such draft")
        return FakeEngine(case, log)

    return starting


def rows_of(path: Path | None = None) -> Rows:
    return Rows(path, {"model": "m"}, KEY)


def test_a_draft_is_held_against_its_target_and_dense(start: Any, log: list[Any]) -> None:
    rows, case = rows_of(), Case(INT8, "2:4", 2)
    compare([case], {"text": [[1]] * 4}, [1, 4], start, rows)
    one, four = rows.all()
    assert one["step_ms"] == pytest.approx(60)
    assert one["alone_ms"] == pytest.approx(50)
    assert one["dense_ms"] == pytest.approx(100)
    assert (one["step_ratio"], one["tokens_per_step"]) == (pytest.approx(1.2), 2.0)
    assert one["ratio"] == pytest.approx(2 / 1.2)
    assert one["dense_ratio"] == pytest.approx(2 * 2 / 1.2)
    assert one["tokens_per_second"] == pytest.approx(2 / 0.06)
    assert four["tokens_per_second"] == pytest.approx(4 * 2 / 0.06)
    assert four["step_ms"] == pytest.approx(60)
    assert (one["answers"], four["answers"]) == (4, 4)
    assert (one["resident_mib"], one["alone_resident_mib"]) == (2000, 1000)
    turn = [Case(DENSE), Case(INT8), case]
    assert log[3:] == [
        *((engine, 1) for engine in turn * 5),  # warmed up, then four prompts
        *((engine, 4) for engine in turn),
        *(("close", engine) for engine in reversed(turn)),
    ]


def test_what_a_result_holds_is_not_measured_again(
    start: Any, log: list[Any], tmp_path: Path
) -> None:
    cases = [Case(DENSE, "2:4", 1), Case(INT8, "2:4", 1)]
    for asked in (cases[:1], cases, cases):
        compare(asked, {"text": [[1]]}, [1], start, rows_of(tmp_path / "result.json"))
    started = [case for event, case in log if event == "start"]
    assert [case for case in started if case.drafted] == cases
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 2


def test_a_draft_that_does_not_start_is_refused(start: Any) -> None:
    rows = rows_of()
    compare([Case(DENSE, "2:4", 9), Case(DENSE, "2:4", 1)], {"text": [[1]]}, [1], start, rows)
    refused, measured = rows.all()
    assert refused["refused"] == "no such draft"
    assert "ratio" in measured
    lines = table({"rows": rows.all()}).splitlines()
    assert "| dense bfloat16 | 2:4 | 9 | text | 1 | refused |" in lines[2]
    assert "| 110 ms (1.10x) | 1.50 | 1.36x | 1.36x | 1500 (1000) |" in lines[3]
    (*_, arbitrary) = table({"rows": [{**measured, "text": ARBITRARY}]}).splitlines()
    assert "| 110 ms (1.10x) |  |  |  | 1500 (1000) |" in arbitrary


def test_prompts_lie_evenly_in_their_text() -> None:
    found = prompts_of("any", lambda _: range(1000), 4)
    assert [list(prompt[:1]) for prompt in found] == [[0], [250], [500], [750]]
    assert {len(prompt) for prompt in found} == {speculation.PROMPT_TOKENS}
    with pytest.raises(ValueError, match="a text of 100 tokens is too short for 4 prompts"):
        prompts_of("any", lambda _: range(100), 4)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--dense", "d"], "--dense, --draft and --text go together"),
        (["--dense", "d", "--draft", "s", "--text", "t", "--checkpoints", "c"], "in its place"),
        ([], "give --checkpoints, or --dense"),
        (["--dense", "d", "--draft", "s", "--text", "t"], "d is no checkpoint"),
        (["--checkpoints", "c", "--drafted", "0"], "are numbers above 0"),
        (["--checkpoints", "c", "--batches", "9"], "give as many as the largest of --batches"),
    ],
)
def test_options_that_do_not_go_together(
    options: list[str], why: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path
) -> None:
    words = ["speculation", *options, "--json", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        speculation.main()
    assert why in capsys.readouterr().err
