"""What a result file keeps of earlier runs, and what it says of the making of each row."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.records import rows as records
from benchmarks.records.rows import STAMP, Rows

FACTS = {"windows": 2}


def measured(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: row[name] for name in row if name not in STAMP} for row in rows]


class Calendar:
    """Says what day it is, and which commit the sources are at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.day, self.commit = "2030-01-01", "one"
        monkeypatch.setattr(records, "revision", lambda: self.commit)
        monkeypatch.setattr(records, "commit", lambda: self.commit.removesuffix("-dirty"))
        monkeypatch.setattr(records, "datetime", self)
        self.date = self

    def today(self) -> "Calendar":
        return self

    def isoformat(self) -> str:
        return self.day


@pytest.fixture
def calendar(monkeypatch: pytest.MonkeyPatch) -> Calendar:
    return Calendar(monkeypatch)


def test_rows_of_an_earlier_run_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    first = Rows(path, FACTS, ["name", "seed"])
    first.add({"name": "b", "seed": 0, "value": 1.5})
    second = Rows(path, FACTS, ["name", "seed"])
    assert ("b", 0) in second
    assert ("b", 1) not in second
    assert second["b", 0]["value"] == 1.5
    second.add({"name": "a", "seed": 0, "value": 2.5})
    second.sort(lambda row: row["name"])
    result = json.loads(path.read_text())
    assert [row["name"] for row in result["rows"]] == ["a", "b"]
    assert result["windows"] == 2
    assert Rows(path, FACTS, ["name"]).all() == result["rows"]


def test_a_row_takes_the_place_of_the_one_with_its_key(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    rows = Rows(path, FACTS, ["name"])
    rows.update([{"name": "a", "value": 1}, {"name": "b", "value": 2}])
    rows.update([{"name": "c", "value": 3}, {"name": "a", "value": 4}])
    expected = [{"name": "a", "value": 4}, {"name": "b", "value": 2}, {"name": "c", "value": 3}]
    assert rows.all() == json.loads(path.read_text())["rows"]
    assert measured(rows.all()) == expected


def test_rows_can_be_kept_in_memory(tmp_path: Path) -> None:
    rows = Rows(None, FACTS, ["name"])
    rows.add({"name": "a"})
    assert ("a",) in rows
    assert not list(tmp_path.iterdir())


def test_other_settings_and_other_machines_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    Rows(path, FACTS, ["name"]).add({"name": "a"})
    with pytest.raises(ValueError, match="windows 2, this run has 3"):
        Rows(path, {"windows": 3}, ["name"])
    result = json.loads(path.read_text())
    for part, field, word in (
        ("machine", "instruction_sets", "cpu"),
        ("machine", "cores", "cores"),
        ("machine", "transparent_huge_pages", "transparent_huge_pages"),
        ("versions", "torch", "versions"),
    ):
        other = {**result, part: {**result[part], field: ["abacus"]}}
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"its rows have {word}"):
            Rows(path, FACTS, ["name"])


def test_a_missing_row_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Rows(tmp_path / "result.json", FACTS, ["name"])["a",]


def test_every_row_has_the_date_and_the_commit_of_its_making(
    tmp_path: Path, calendar: Calendar
) -> None:
    path = tmp_path / "result.json"
    Rows(path, FACTS, ["name"]).add({"name": "a"})
    calendar.day, calendar.commit = "2030-02-02", "two-dirty"
    rows = Rows(path, FACTS, ["name"])
    rows.sort(lambda row: row["name"])
    assert json.loads(path.read_text())["date"] == "2030-01-01"
    rows.add({"name": "b"})
    result = json.loads(path.read_text())
    assert result["rows"] == [
        {"name": "a", "date": "2030-01-01", "commit": "one"},
        {"name": "b", "date": "2030-02-02", "commit": "two-dirty"},
    ]
    assert (result["date"], result["commit"]) == ("2030-02-02", "two")
    calendar.commit = "three"  # while it runs
    rows.add({"name": "c"})
    assert rows["c",]["commit"] == "two-dirty..three"


def test_a_row_that_is_completed_later_names_both_commits(
    tmp_path: Path, calendar: Calendar
) -> None:
    path = tmp_path / "result.json"
    Rows(path, FACTS, ["name"]).add({"name": "a", "near": 1})
    calendar.day, calendar.commit = "2030-02-02", "two"
    rows = Rows(path, FACTS, ["name"])
    rows.add({**rows["a",], "far": 2})
    both = {"name": "a", "near": 1, "far": 2, "date": "2030-02-02", "commit": "one..two"}
    assert rows.all() == [both]
    rows.add({"name": "a", "near": 3})
    assert rows.all() == [{"name": "a", "near": 3, "date": "2030-02-02", "commit": "two"}]


def test_rows_of_older_files_stay_as_they_are(tmp_path: Path, calendar: Calendar) -> None:
    path = tmp_path / "result.json"
    Rows(path, FACTS, ["name"]).add({"name": "a"})
    old = json.loads(path.read_text())
    old["rows"], old["date"] = [{"name": "a"}], "2029-09-09"
    del old["commit"]
    path.write_text(json.dumps(old))
    rows = Rows(path, FACTS, ["name"])
    rows.add({"name": "b"})
    assert rows.all()[0] == {"name": "a"}
    assert json.loads(path.read_text())["date"] == rows["b",]["date"] == "2030-01-01"
