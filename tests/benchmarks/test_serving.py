"""What the serving benchmark makes of engines: cells, turns, ratios, and what was refused."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import serving
from benchmarks.engines import serving_tables
from benchmarks.engines.engine import Answers, EngineError
from benchmarks.engines.serving_rows import KEY, repeats_of, with_ratios
from benchmarks.engines.weight_bytes import DecodedWeights
from benchmarks.records.rows import Rows
from benchmarks.serving import compare

MEASUREMENTS = itertools.count()
SPEEDS = {"dense": 10.0, "sparse": 25.0, "int8": 40.0, "dying": 1.0}


class FakeEngine:
    """Decodes at a fixed speed, and ends in a batch of 13; `dying` ends when it has answered."""

    def __init__(self, name: str, log: list[Any]) -> None:
        if name == "broken":
            raise RuntimeError("no kernel")
        self.name, self.log = name, log
        log.append(("start", name))

    def answers(self, batch: int, prompt: int, output: int) -> Answers:
        if batch == 13 and self.name == "sparse":
            raise EngineError("out of memory")
        self.log.append((self.name, batch, prompt))
        return Answers(prompt / SPEEDS[self.name], batch * SPEEDS[self.name])

    def facts(self) -> dict[str, Any]:
        if self.name == "dying":
            raise EngineError("held more than 8 GiB")
        memory = {"dense": 1000.0, "sparse": 600.0, "int8": 400.0}[self.name]
        facts: dict[str, Any] = {"load_seconds": memory / 100, "threads": 2, "resident_mib": memory}
        facts["measurement"] = next(MEASUREMENTS)
        return facts | ({} if self.name == "dense" else {"packed_ratio": 0.5})

    def close(self) -> None:
        self.log.append(("close", self.name))


@pytest.fixture
def log() -> list[Any]:
    return []


@pytest.fixture
def start(log: list[Any]) -> Any:
    return lambda name: FakeEngine(name, log)


def test_variants_take_turns_and_are_held_against_dense(start: Any, log: list[Any]) -> None:
    weights = DecodedWeights(linears=3000, head=1000)
    variants = ["dense", "sparse"]
    rows = compare(variants, [(1, 64), (8, 64)], start, repeats=2, weights=weights)
    assert [(row["variant"], row["batch"]) for row in rows] == [
        ("dense", 1), ("sparse", 1), ("dense", 8), ("sparse", 8)
    ]  # fmt: skip
    turn = [("dense", 1, 32), ("sparse", 1, 32), *[("dense", 1, 64), ("sparse", 1, 64)] * 2]
    assert log[2:8] == turn  # warmed up with a short prompt
    sparse = rows[1]
    assert sparse["decode_tokens_per_second"] == 25
    assert sparse["time_to_first_token_ms"] == pytest.approx(2560)
    assert (sparse["decode_ratio"], sparse["first_token_ratio"]) == (2.5, 2.5)
    assert sparse["resident_ratio"] == 0.6
    assert "load_ratio" not in sparse  # of one start each, and the first pays for the process
    assert sparse["byte_ratio"] == pytest.approx(4000 / 2500)
    assert (sparse["threads"], sparse["repeats"]) == (2, 2)
    assert "load_average" in sparse
    assert "byte_ratio" not in rows[3]  # more than one sequence
    assert [row["decode_ratio"] for row in rows[::2]] == [1.0, 1.0]
    assert log[-2:] == [("close", "dense"), ("close", "sparse")]


@pytest.mark.parametrize("alone", [False, True], ids=["in turn", "one at a time"])
def test_a_variant_alone_runs_without_dense(
    alone: bool, start: Any, log: list[Any], tmp_path: Path
) -> None:
    def run(variants: list[str]) -> list[dict[str, Any]]:
        rows = Rows(tmp_path / "result.json", {"model": "m"}, KEY)
        options: dict[str, Any] = {"repeats": 1, "one_at_a_time": alone, "dense": "dense"}
        return compare(variants, [(1, 32)], start, rows, **options)

    (row,) = run(["sparse"])
    assert [entry[1] for entry in log if entry[0] == "start"] == ["sparse"]
    assert {"decode_tokens_per_second", "load_seconds", "resident_mib"} <= set(row)
    assert [name for name in row if name.endswith("_ratio")] == ["packed_ratio"]
    log.clear()
    run(["dense"])
    *_, later = run(["int8"])
    assert ("start", "sparse") not in log
    # Of another run is the dense row that is there: good enough only where no turns are taken.
    assert later.get("decode_ratio") == (4.0 if alone else None)


def test_a_variant_that_does_not_start_or_ends_is_refused(start: Any) -> None:
    rows = compare(["dense", "broken", "sparse"], [(13, 32), (1, 32)], start, repeats=1)
    by_place = {(row["variant"], row["batch"]): row for row in rows}
    assert by_place["broken", 13]["refused"] == by_place["broken", 1]["refused"] == "no kernel"
    assert by_place["sparse", 13]["refused"] == "out of memory"
    assert by_place["sparse", 1]["decode_ratio"] == 2.5
    assert "decode_ratio" not in by_place["sparse", 13]


def test_a_checkpoint_that_cannot_be_made_is_why(start: Any) -> None:
    def failing(name: str) -> Any:
        if name == "dense":
            return start(name)
        raise subprocess.CalledProcessError(2 if name == "sparse" else -9, ["/some/where/python"])

    rows = compare(["dense", "sparse", "int8"], [(1, 32)], failing, repeats=1)
    assert [row.get("refused") for row in rows] == [
        None,
        "making its checkpoint ended with status 2",
        "making its checkpoint was killed by SIGKILL: is there enough memory?",
    ]


def test_a_refused_variant_is_in_the_record_and_in_the_tables(start: Any, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    compare(["dense", "broken"], [(1, 32)], start, Rows(file, {}, KEY), repeats=1)
    record = json.loads(file.read_text())
    assert record["rows"][1]["refused"] == "no kernel"
    assert "\n| broken | refused |" in serving_tables.decode(record)
    assert serving_tables.decode(record).endswith("\n\nbroken was refused: `no kernel`")


def test_a_variant_that_ends_after_its_answers_is_refused(start: Any) -> None:
    rows = compare(["dense", "dying"], [(1, 32)], start, repeats=1)
    assert rows[1]["refused"] == "held more than 8 GiB"
    assert "decode_tokens_per_second" not in rows[1]


def test_without_dense_there_are_no_ratios(start: Any) -> None:
    rows = compare(["broken", "sparse"], [(1, 32)], start, repeats=1)
    assert "refused" in rows[0]
    assert rows[1]["decode_tokens_per_second"] == 25
    assert not any(name.endswith("_ratio") for name in rows[1] if name != "packed_ratio")


@pytest.mark.parametrize("alone", [False, True], ids=["in turn", "one at a time"])
def test_a_run_measures_what_its_result_lacks(
    alone: bool, start: Any, log: list[Any], tmp_path: Path
) -> None:
    def run(variants: list[str], cells: list[tuple[int, int]]) -> list[dict[str, Any]]:
        log.clear()
        rows = Rows(tmp_path / "result.json", {"model": "m"}, KEY)
        return compare(variants, cells, start, rows, repeats=1, one_at_a_time=alone)

    first = run(["dense", "sparse"], [(1, 32)])
    assert run(["dense", "sparse"], [(1, 32)]) == first
    assert log == []
    run(["dense", "sparse"], [(1, 32), (8, 32)])
    assert {entry[1] for entry in log if entry[0] in SPEEDS} == {8}
    rows = run(["dense", "int8"], [(1, 32)])
    assert [row for row in rows if row["variant"] == "dense" and row["batch"] == 1] == first[:1]
    assert rows[-1]["decode_ratio"] == 4.0
    # In turn, dense runs beside what is new; alone, it is the row that is there.
    assert (("start", "dense") in log) is not alone
    assert ("start", "sparse") not in log
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == rows


def test_engines_are_closed_when_a_run_is_stopped(log: list[Any]) -> None:
    class Stopped(FakeEngine):
        def answers(self, batch: int, prompt: int, output: int) -> Answers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(["dense"], [(1, 32)], lambda name: Stopped(name, log))
    assert log == [("start", "dense"), ("close", "dense")]


def test_long_prompts_are_measured_less_often() -> None:
    cells = [(1, 32), (8, 32), (32, 32), (1, 512), (8, 512), (32, 512)]
    assert [repeats_of(*cell) for cell in cells] == [5, 5, 3, 3, 2, 1]


def test_times_and_speeds_are_turned_into_times_as_fast() -> None:
    dense = {"variant": "d", "time_to_first_token_ms": 4.0, "decode_tokens_per_second": 5.0}
    row = {"variant": "s", "time_to_first_token_ms": 2.0, "decode_tokens_per_second": 15.0}
    found = with_ratios(row, dense)
    assert (found["first_token_ratio"], found["decode_ratio"]) == (2, 3)
    assert with_ratios(row, None) == row
    assert with_ratios(row, {"refused": "x"}) == row
    assert with_ratios({"refused": "x"}, dense) == {"refused": "x"}


def test_peers_have_the_bytes_of_their_format() -> None:
    weights = DecodedWeights(linears=100, head=0)
    dense = {"variant": "dense", "batch": 1}
    for variant, group, ratio in (
        ("vLLM int8 (W8A8)", None, 2.0),
        ("vLLM int4 (GPTQ)", 128, 3.85),
        ("vLLM int4 (GPTQ)", 64, 16 / 4.3125),
    ):
        row = with_ratios({"variant": variant, "batch": 1}, dense, weights, group)
        assert row["byte_ratio"] == pytest.approx(ratio, abs=0.001)
    assert "byte_ratio" not in with_ratios(
        {"variant": "vLLM int4 (GPTQ)", "batch": 1}, dense, weights
    )


def test_rows_of_int4_know_the_group_size(start: Any, log: list[Any]) -> None:
    rows = compare(
        ["dense", "vLLM int4 (GPTQ)"],
        [(1, 32)],
        lambda name: start("dense"),
        weights=DecodedWeights(linears=100, head=0),
        repeats=1,
        int4_group=64,
    )
    assert rows[1]["byte_ratio"] == pytest.approx(16 / 4.3125)


def checkpoint(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "hidden_size": 8}))
    return folder


def test_the_command_measures_every_batch_with_every_prompt(
    tmp_path: Path,
    start: Any,
    log: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense, _ = checkpoint(tmp_path / "model"), checkpoint(tmp_path / "other")
    names = {dense: "dense", tmp_path / "other": "sparse"}
    limits: set[float | None] = set()

    def engine(
        path: Path, *, eager: bool, dtype: str, head: str, memory_limit: float | None
    ) -> FakeEngine:
        assert (dtype, head) == ("bfloat16", "dense")
        limits.add(memory_limit)
        return start(names[path])

    monkeypatch.setattr(serving, "Engine", engine)
    monkeypatch.setenv(serving.RESERVED_CORES, "1")
    output = tmp_path / "result.json"
    command = [
        *("serving", "--dense", str(dense), "--sparse", str(tmp_path / "other")),
        *("--cells", "4x512", "2x512", "4x32", "2x32", "--repeats", "1", "--reserved-cores", "0"),
        *("--json", str(output), "--plot", str(tmp_path / "plot.svg"), "--memory-limit", "2.5"),
    ]
    monkeypatch.setattr(sys, "argv", command)
    serving.main()
    result = json.loads(output.read_text())
    assert [(row["prompt_tokens"], row["batch"], row["variant"]) for row in result["rows"]] == [
        (prompt, batch, name)
        for prompt in (32, 512)
        for batch in (2, 4)
        for name in ("dense bfloat16", "2:4")
    ]
    named = ("model", "shape", "mode", "reserved_cores", "in_turn", "memory_limit_gib")
    assert limits == {2.5}
    assert {name: result[name] for name in named} == {
        "model": "model", "shape": {"model_type": "x", "hidden_size": 8}, "mode": "eager",
        "reserved_cores": "0", "in_turn": True, "memory_limit_gib": 2.5,
    }  # fmt: skip
    plot = (tmp_path / "plot.svg").read_text()
    assert all(plot.count(f">batch {batch}<") == 2 * 2 for batch in (2, 4))  # two panels
    more = [*command[: command.index("--cells") + 1], "1x512", "--json", str(output)]
    more += ["--reserved-cores", "0", "--memory-limit", "2.5"]
    monkeypatch.setattr(sys, "argv", more)
    log.clear()
    serving.main()
    assert {entry[1:] for entry in log if entry[0] in SPEEDS} == {(1, 32), (1, 512)}
    added = json.loads(output.read_text())["rows"]
    assert [row for row in added if row["batch"] != 1] == result["rows"]
    assert [(row["prompt_tokens"], row["batch"]) for row in added[4:6]] == [(512, 1)] * 2
    monkeypatch.setattr(sys, "argv", [*command, "--compiled"])
    with pytest.raises(SystemExit):
        serving.main()
    assert "its rows have mode 'eager'" in capsys.readouterr().err
