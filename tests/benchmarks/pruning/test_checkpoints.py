"""Checkpoints are baked once, and what they took is known as long as its record is there."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pruning import checkpoints, commands
from benchmarks.pruning.checkpoints import Checkpoints, Key
from benchmarks.texts import Texts
from permllm_offline.preparation.recipe_input import make_recipe, read_recipe

KEY: Key = ("wanda+cp/obs", "2:4", 1, "int8")


@pytest.fixture
def pruned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that were run; each makes its output."""
    ran: list[list[str]] = []

    def run(*arguments: Any) -> None:
        ran.append([str(argument) for argument in arguments])
        Path(ran[-1][ran[-1].index("--output") + 1]).mkdir()

    monkeypatch.setattr(commands, "permllm_offline", run)
    monkeypatch.setattr(checkpoints, "permllm_offline", run)
    monkeypatch.setattr(checkpoints, "smollm2", lambda: tmp_path / "model")
    texts = Texts(tmp_path / "text.txt", tmp_path / "other.txt")
    monkeypatch.setattr(checkpoints, "sotu", lambda: texts)
    return ran


def test_a_checkpoint_is_baked_once_and_remembers_what_it_took(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    folder = tmp_path / "new" / "folder"
    made, times = Checkpoints(folder, effort="low").baked(KEY)
    assert made == folder / "wanda+cp-obs_2-4_1_int8"
    assert times is not None
    assert 0 <= times.prune_seconds < 60
    assert Checkpoints(folder, effort="low").baked(KEY) == (made, times)
    (command,) = pruned
    assert "--restart" in command  # what a stopped run has left would not be timed
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


@pytest.mark.parametrize(
    ("method", "layers", "windows", "own"),
    [
        ("permllm-wanda@last:6", "last:6", 128, None),
        ("permllm-best@no-self-windows", "all", 96, 0),
        ("permllm-wanda/obs+distillation@last:6", "last:6", 96, 32),
    ],
)
def test_a_variant_is_pruned_by_its_recipe_at_the_same_effort(
    tmp_path: Path,
    pruned: list[list[str]],
    method: str,
    layers: str,
    windows: int,
    own: int | None,
) -> None:
    made, _ = Checkpoints(tmp_path, ("--num-samples", "7"), "low").baked((method, "2:4", 1, "int8"))
    (command,) = pruned
    recorded = read_recipe(Path(command[command.index("--recipe") + 1]))
    assert "--effort" not in command  # it would come before the file
    assert command[command.index("--method") + 1] == method.partition("@")[0].partition("/")[0]
    assert command[command.index("--num-samples") + 1] == "7"
    assert made.parent == tmp_path
    recipe = make_recipe({}, recorded=recorded)
    assert recipe.learning.layers == layers
    assert recipe.num_samples == windows
    if own is not None:
        assert recipe.distillation.self_windows == own
        assert recipe.distillation.steps == 150


@pytest.mark.parametrize(("variant", "reads"), [("", True), ("-without-text", False)])
def test_what_is_converted_is_pruned_once_before(
    tmp_path: Path, pruned: list[list[str]], variant: str, reads: bool
) -> None:
    folder = Checkpoints(tmp_path, ("--num-samples", "7"), "low")
    before, _ = folder.baked(("wanda/obs", "4:8", 1, "bfloat16"))
    for values in ("int8", "int4"):
        made, times = folder.baked((f"wanda/obs@converted{variant}", "4:8", 1, values))
        assert made.exists()
        assert times is not None
        command = pruned.pop()
        assert command[:2] == ["convert", str(before)]
        assert command[command.index("--values") + 1] == values
        assert ("--dataset" in command) == reads
    assert len(pruned) == 1


def test_the_times_of_an_effort_are_those_of_its_option(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    made, times = Checkpoints(tmp_path, ("--sequence-length", "512"), "low").baked(KEY)
    same = ("--sequence-length", "512", "--effort", "low")
    assert Checkpoints(tmp_path, same).baked(KEY) == (made, times)
    assert Checkpoints(tmp_path, same[:2], "high").baked(KEY) == (made, None)


def test_a_checkpoint_from_elsewhere_has_no_times(tmp_path: Path, pruned: list[list[str]]) -> None:
    made, _ = Checkpoints(tmp_path).baked(KEY)
    made.with_name(f"{made.name}.times.json").unlink()
    assert Checkpoints(tmp_path).baked(KEY) == (made, None)
    assert len(pruned) == 1


def test_times_are_those_of_this_machine_these_versions_and_options(
    tmp_path: Path, pruned: list[list[str]]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("a: 1")
    same = Checkpoints(tmp_path / "made", ("--recipe", recipe))
    made, times = same.baked(KEY)
    assert times is not None
    record = made.with_name(f"{made.name}.times.json")
    found = json.loads(record.read_text())
    assert {"machine", "versions", "commit", "options"} <= set(found)
    for options in ((), ("--recipe", recipe, "--effort", "low")):
        assert Checkpoints(tmp_path / "made", options).baked(KEY) == (made, None)
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
    made, times = Checkpoints(tmp_path).baked(KEY)
    assert times is not None
    made.with_name(f"{made.name}.times.json").write_text(json.dumps(asdict(times)))
    assert Checkpoints(tmp_path).baked(KEY) == (made, None)
