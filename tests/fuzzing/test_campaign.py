"""A campaign fails unless every input was executed and none found a bug."""

import json
from pathlib import Path

import pytest

from benchmarks.records import machine
from tests.fuzzing import __main__ as campaign
from tests.fuzzing.__main__ import Outcome, Part, judged, parts
from tests.fuzzing.targets import TARGETS

PART = Part("config", 100, 1)
REPORT = "#100 DONE cov: 40 ft: 60\nstat::number_of_executed_units: {}\n"


def test_a_whole_part_is_good() -> None:
    assert judged(PART, 0, 2.0, REPORT.format(100)) == Outcome("config", 100, 40, 2.0, "")


@pytest.mark.parametrize(
    ("status", "report"),
    [(0, REPORT.format(99)), (0, ""), (77, REPORT.format(100)), (-9, REPORT.format(100))],
    ids=["fewer", "no count", "finding", "killed"],
)
def test_any_other_end_is_an_error(status: int, report: str) -> None:
    assert "config" in judged(PART, status, 2.0, report).error


@pytest.mark.parametrize("inputs", [1, 999, 1234, 1_000_000])
def test_the_parts_are_no_fewer_than_was_asked_for(inputs: int) -> None:
    planned = parts(inputs, seed=1)
    assert sum(part.inputs for part in planned) >= inputs
    assert {part.target for part in planned} == set(TARGETS)
    assert len({(part.target, part.seed) for part in planned}) == len(planned)


@pytest.mark.parametrize(("share", "status"), [(1, 0), (0, 1)])
def test_the_total_decides_too(
    share: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["fuzz", "--inputs", "2000"])
    monkeypatch.setattr(
        campaign, "run", lambda part: Outcome(part.target, part.inputs * share, 1, 0.0, "")
    )
    assert campaign.main() == status
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"fuzz: {2000 * share} inputs (config ")
    assert last.endswith(f", {status} findings")


def test_a_record_names_the_sources_that_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "fuzz.json"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr("sys.argv", ["fuzz", "--inputs", "1", "--json", str(file)])
    monkeypatch.setattr(campaign, "run", lambda part: Outcome(part.target, part.inputs, 1, 0.0, ""))
    monkeypatch.setattr(campaign, "revision", lambda: "one")
    monkeypatch.setattr(machine, "revision", lambda: "two")
    assert campaign.main() == 0
    assert json.loads(file.read_text())["commit"] == "one..two"
