"""``~`` stands for a home directory where there is one, and never causes a traceback."""

from argparse import _SubParsersAction
from pathlib import Path

import pytest

import permllm_offline
from permllm_offline.cli import build_parser, main
from permllm_offline.run.local_path import local_path
from permllm_offline.text.documents import documents

NOBODY = "~no-such-user/model"


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("mine", encoding="utf-8")
    assert local_path("~/x.txt") == local_path(Path("~/x.txt")) == tmp_path / "x.txt"
    assert local_path("a/~/b") == Path("a/~/b")
    assert list(documents("~/x.txt")) == ["mine"]


def test_the_home_of_nobody_is_a_name_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_path(NOBODY) == Path(NOBODY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NOBODY).parent.mkdir()
    (tmp_path / NOBODY).write_text("odd", encoding="utf-8")
    assert list(documents(NOBODY)) == ["odd"]


@pytest.mark.parametrize(
    "arguments",
    [("plan", NOBODY), ("prune", NOBODY, "--output", "out"), ("eval", NOBODY, "--dataset", "x")],
)
def test_a_model_in_the_home_of_nobody_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert repr(NOBODY) in capsys.readouterr().err


def test_every_path_of_the_commands_is_expanded() -> None:
    (commands,) = (a for a in build_parser()._actions if isinstance(a, _SubParsersAction))
    kinds = {
        (command, action.dest): action.type
        for command, parser in commands.choices.items()
        for action in parser._actions
    }
    assert Path not in kinds.values()
    expanded = {name for name, kind in kinds.items() if kind is local_path}
    assert expanded >= {(command, "json") for command in commands.choices if command != "prune"}
    assert expanded >= {("prune", "output"), ("prune", "recipe"), ("convert", "output")}
    assert expanded >= {("inspect", "directory"), ("eval", "tasks_path")}


def test_paths_of_a_prune_lie_in_the_home_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("seed: 7\n", encoding="utf-8")
    asked: list[tuple[int, Path]] = []
    monkeypatch.setattr(
        "permllm_offline.pipeline.prune",
        lambda recipe, output, **_: asked.append((recipe.seed, output)),
    )
    permllm_offline.prune("m", "~/out", recipe="~/mine.yaml")
    assert asked == [(7, tmp_path / "out")]
    options = build_parser().parse_args(["prune", "m", "--output=~/out", "--recipe=~/mine.yaml"])
    assert (options.output, options.recipe) == (tmp_path / "out", tmp_path / "mine.yaml")
