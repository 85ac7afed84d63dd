"""What a prune makes of the steps that another one left beside its output."""

import json
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from permllm_offline.cli import main
from permllm_offline.run.steps import Step, WorkFolder
from tests.robustness.children import child
from tests.robustness.stages import stop_at

TUNED = ("--method", "wanda+cp", "--reconstruction", "obs+blockwise", "--recipe")
BLOCKWISE = {"blockwise": {"steps": 4, "validation_interval": 2}}


class CutOff(BaseException):
    """In place of a signal."""


Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(tiny_model_directory: Path, text_file: Path) -> Arguments:
    """The command line of an output and more options."""
    data = ("--dataset", str(text_file), "--num-samples", "12", "--sequence-length", "24")

    def arguments(output: Path, *more: str) -> list[str]:
        method = more or ("--method", "sparsegpt", "--values", "int8")
        pattern = ("--pattern", "2:4")  # in processes of their own too
        command = ["prune", str(tiny_model_directory), *data, *pattern]
        return [*command, *method, "--output", str(output)]

    return arguments


def test_a_second_prune_leaves_the_steps_of_the_first(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(tmp_path / "sparse")
    with WorkFolder(tmp_path / ".sparse.work", "a") as work:
        work.step("one", Step)
        assert main(line) == 2
        assert "another run to the same output" in capsys.readouterr().err
        assert work.finished("one")


def test_text_that_cannot_be_drawn_costs_no_steps(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = arguments(tmp_path / "sparse")
    with WorkFolder(tmp_path / ".sparse.work", "a") as work:
        work.step("one", Step)
    assert main([*line, "--num-samples", "5000", "--restart"]) == 2
    assert "is too short" in capsys.readouterr().err
    assert work.finished("one")


def test_another_recipe_is_refused_before_text_is_drawn(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with WorkFolder(tmp_path / ".sparse.work", "a") as work:
        work.step("one", Step)
    drawn = "permllm_offline.preparation.prepared.sample_windows"
    monkeypatch.setattr(drawn, lambda *_, **__: pytest.fail("text is drawn"))
    assert main(arguments(tmp_path / "sparse")) == 2
    assert "holds steps of another recipe" in capsys.readouterr().err
    assert work.finished("one")


def test_a_dry_run_says_what_the_prune_would_make_of_steps_and_leaves_them(
    arguments: Arguments,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = tmp_path / "short.yaml"
    recipe.write_text(json.dumps(BLOCKWISE), encoding="utf-8")
    line = arguments(tmp_path / "sparse", *TUNED, str(recipe))
    text = tmp_path / "text.txt"
    shutil.copy(line[line.index("--dataset") + 1], text)
    line[line.index("--dataset") + 1] = str(text)
    original, calls = WorkFolder._write, 0

    def cut(self: WorkFolder, *more: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # one layer, and the hidden states after it, are there
            raise CutOff
        original(self, *more)

    monkeypatch.setattr(WorkFolder, "_write", cut)
    with pytest.raises(CutOff):
        main(line)
    work = tmp_path / ".sparse.work"
    before = {file.name: file.read_bytes() for file in work.iterdir()}
    capsys.readouterr()
    monkeypatch.setattr(WorkFolder, "__init__", lambda *_, **__: pytest.fail("it is locked"))
    assert main([*line, "--dry-run"]) == 0
    assert (
        f"{work} is left from a run that was cut off: a prune goes on after layer 1" in caplog.text
    )
    caplog.clear()
    assert main([*line, "--seed", "7", "--dry-run"]) == 2
    assert "seed is 0 there and 7 here" in capsys.readouterr().err
    assert main([*line, "--seed", "7", "--dry-run", "--restart"]) == 0
    words = text.read_text(encoding="utf-8").split()
    text.write_text(" ".join(reversed(words)), encoding="utf-8")
    assert main([*line, "--dry-run"]) == 2
    assert "the calibration text is another" in capsys.readouterr().err
    assert "goes on" not in caplog.text
    assert {file.name: file.read_bytes() for file in work.iterdir()} == before


def test_a_dry_run_sees_a_prune_at_work(
    arguments: Arguments, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    line = [*arguments(tmp_path / "sparse"), "--dry-run"]
    with WorkFolder(tmp_path / ".sparse.work", "a") as work:
        assert main(line) == 0
        assert f"another prune is at work in {work.directory}" in caplog.text
    caplog.clear()
    assert main(line) == 0
    assert caplog.text == ""


def test_another_config_is_another_run(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(arguments(tmp_path)[1], model)
    line = arguments(tmp_path / "sparse")
    line[1] = str(model)
    stage = "a finished step is written:2"
    assert child(line, partial(stop_at, stage, signal.SIGKILL)).status == -signal.SIGKILL
    config = json.loads((model / "config.json").read_text())
    config["rms_norm_eps"] = 0.1
    (model / "config.json").write_text(json.dumps(config))
    kept = sorted((tmp_path / ".sparse.work").iterdir())
    assert main(line) == 2
    assert "holds steps of another recipe" in (error := capsys.readouterr().err)
    assert "version (config.json is '" in error
    assert sorted((tmp_path / ".sparse.work").iterdir()) == kept
    assert main([*line, "--restart"]) == 0
    assert not (tmp_path / ".sparse.work").exists()
