"""Which code a measurement is of."""

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.records import machine
from benchmarks.records.machine import commit, revision, write_json


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("benchmarks/cpu/a.py", "offline/b.py", "docs/c.md", "benchmarks/results/d.json"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1\n")
    _git(tmp_path, "init", "--quiet")
    _git(tmp_path, "add", ".")
    _git(tmp_path, "commit", "--quiet", "--message", "all")
    return tmp_path


def _git(folder: Path, *words: str) -> None:
    who = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *words], cwd=folder, check=True)


@pytest.mark.parametrize("changed", ["benchmarks/cpu/a.py", "offline/b.py", "offline/new.py"])
def test_a_commit_with_other_sources_is_marked(repository: Path, changed: str) -> None:
    inside = repository / "benchmarks" / "cpu"
    clean = commit(inside)
    assert clean is not None
    assert revision(inside) == clean
    (repository / changed).write_text("2\n")
    assert (revision(inside), commit(inside)) == (f"{clean}-dirty", clean)


def test_pages_and_results_are_no_sources(repository: Path) -> None:
    for name in ("docs/c.md", "benchmarks/results/d.json"):
        (repository / name).write_text("2\n")
    assert revision(repository) == commit(repository)


def test_outside_git_there_is_no_commit(tmp_path: Path) -> None:
    assert revision(tmp_path) is None


def test_a_result_names_the_revisions_of_its_beginning_and_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    monkeypatch.setattr(machine, "revision", lambda: "two-dirty")
    for begun, expected in (
        (None, "two-dirty"),
        ("two-dirty", "two-dirty"),
        ("one", "one..two-dirty"),
    ):
        write_json(path, {}, begun)
        assert json.loads(path.read_text())["commit"] == expected
    monkeypatch.setattr(machine, "revision", lambda: None)
    write_json(path, {}, "one")
    assert json.loads(path.read_text())["commit"] is None
