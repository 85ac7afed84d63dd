"""Checkpoints are baked once, and what they took is known as long as its record is there."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.pruning import checkpoints
from benchmarks.pruning.checkpoints import Checkpoints, Key
from benchmarks.texts import Texts

KEY: Key = ("wanda+cp/obs", "2:4", 1, "int8")


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that were run; each makes its output."""
    commands: list[list[str]] = []

    def run(*arguments: Any) -> None:
        commands.append([str(argument) for argument in arguments])
        Path(commands[-1][commands[-1].index("--output") + 1]).mkdir()

    monkeypatch.setattr(checkpoints, "permllm_offline", run)
    monkeypatch.setattr(checkpoints, "smollm2", lambda: tmp_path / "model")
    texts = Texts(tmp_path / "text.txt", tmp_path / "other.txt")
    monkeypatch.setattr(checkpoints, "sotu", lambda: texts)
    return commands


def test_a_checkpoint_is_baked_once_and_remembers_what_it_took(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    folder = tmp_path / "new" / "folder"
    made, times = Checkpoints(folder, ("--effort", "low")).baked(KEY)
    assert made == folder / "wanda+cp-obs_2-4_1_int8"
    assert times is not None
    assert 0 <= times.prune_seconds < 60
    assert Checkpoints(folder).baked(KEY) == (made, times)
    (command,) = pruned
    for option, value in (
        ("--method", "wanda+cp"),
        ("--reconstruction", "obs"),
        ("--pattern", "2:4"),
        ("--seed", "1"),
        ("--values", "int8"),
        ("--effort", "low"),
        ("--dataset", str(tmp_path / "text.txt")),
    ):
        assert command[command.index(option) + 1] == value


def test_a_checkpoint_from_elsewhere_has_no_times(tmp_path: Path, pruned: list[list[str]]) -> None:
    made, _ = Checkpoints(tmp_path).baked(KEY)
    made.with_name(f"{made.name}.times.json").unlink()
    assert Checkpoints(tmp_path).baked(KEY) == (made, None)
    assert len(pruned) == 1
