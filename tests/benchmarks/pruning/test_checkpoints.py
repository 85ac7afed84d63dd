"""Checkpoints are baked once, and what they took is known as long as its record is there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pruning import checkpoints, commands
from benchmarks.pruning.checkpoints import Checkpoints, Sparse
from benchmarks.texts import Texts

KEY = Sparse("wanda+cp", "2:4", "low", "int8", 1)
MODEL = Path("model")


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that were run; each makes its output."""
    ran: list[list[str]] = []

    def run(*arguments: Any) -> None:
        ran.append([str(argument) for argument in arguments])
        Path(ran[-1][ran[-1].index("--output") + 1]).mkdir()

    monkeypatch.setattr(commands, "permllm_offline", run)
    texts = Texts(tmp_path / "text.txt", tmp_path / "other.txt")
    monkeypatch.setattr(checkpoints, "sotu", lambda: texts)
    return ran


def test_a_checkpoint_is_baked_once_and_remembers_what_it_took(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    folder = tmp_path / "new" / "folder"
    made, times = Checkpoints(folder, MODEL).baked(KEY)
    assert made == folder / "wanda+cp_2-4_low_int8_1"
    assert times is not None
    assert 0 <= times.prune_seconds < 60
    assert Checkpoints(folder, MODEL).baked(KEY) == (made, times)
    (command,) = pruned
    assert "--restart" in command  # what a stopped run has left would not be timed
    for option, value in (
        ("--method", "wanda+cp"),
        ("--pattern", "2:4"),
        ("--seed", "1"),
        ("--values", "int8"),
        ("--effort", "low"),
        ("--dataset", str(tmp_path / "text.txt")),
    ):
        assert command[command.index(option) + 1] == value


def test_a_checkpoint_from_elsewhere_has_no_times(tmp_path: Path, pruned: list[list[str]]) -> None:
    made, _ = Checkpoints(tmp_path, MODEL).baked(KEY)
    made.with_name(f"{made.name}.times.json").unlink()
    assert Checkpoints(tmp_path, MODEL).baked(KEY) == (made, None)
    assert len(pruned) == 1


def test_times_are_those_of_this_machine_these_versions_and_options(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    same = Checkpoints(tmp_path / "made", MODEL, ("--recipe", recipe))
    made, times = same.baked(KEY)
    assert times is not None
    record = made.with_name(f"{made.name}.times.json")
    found = json.loads(record.read_text())
    assert {"machine", "versions", "commit", "options"} <= set(found)
    for options in ((), ("--recipe", recipe, "--no-smoothing")):
        assert Checkpoints(tmp_path / "made", MODEL, options).baked(KEY) == (made, None)
    recipe.write_text("a: 2")
    assert same.baked(KEY) == (made, None)
    recipe.write_text("a: 1")
    assert same.baked(KEY) == (made, times)
    for changed in (
        {"machine": {**found["machine"], "cores": 99}},
        {"machine": {**found["machine"], "cpu": "Another"}},
        {"versions": {**found["versions"], "torch": "0"}},
    ):
        record.write_text(json.dumps({**found, **changed}))
        assert same.baked(KEY) == (made, None)
    record.write_text(json.dumps({**found, "commit": "another", "machine": found["machine"]}))
    assert same.baked(KEY) == (made, times)
    assert len(pruned) == 1


def test_a_record_that_does_not_say_where_it_was_made_is_not_believed(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    made, times = Checkpoints(tmp_path, MODEL).baked(KEY)
    assert times is not None
    made.with_name(f"{made.name}.times.json").write_text(json.dumps(asdict(times)))
    assert Checkpoints(tmp_path, MODEL).baked(KEY) == (made, None)
