import json
from pathlib import Path

import pytest

from benchmarks.records.rows import Rows

FACTS = {"windows": 2}


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
    assert rows.all() == json.loads(path.read_text())["rows"] == expected


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
        ("versions", "torch", "versions"),
    ):
        other = {**result, part: {**result[part], field: ["abacus"]}}
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match=f"its rows have {word}"):
            Rows(path, FACTS, ["name"])


def test_a_missing_row_is_no_row(tmp_path: Path) -> None:
    with pytest.raises(KeyError):
        Rows(tmp_path / "result.json", FACTS, ["name"])["a",]
