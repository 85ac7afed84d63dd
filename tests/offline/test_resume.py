"""A run that was killed after any step goes on from there to the same bytes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.steps import Step, WorkFolder

FILES = ("model.safetensors", "config.json", "recipe.yaml", "report.json")
SIZES = ("--num-samples", "12", "--sequence-length", "24", "--steps", "3")


def arguments(model: Path, text: Path, output: Path, *more: str) -> list[str]:
    data = ("--dataset", str(text), "--output", str(output))
    return ["prune", str(model), *data, *SIZES, *more]


WHOLE = ("--method", "permllm-wanda", "--reconstruction", "sparsegpt")
STREAMED = ("--method", "sparsegpt")


class Killed(BaseException):
    """Stands for a signal that cannot be caught."""


def kill_after(method: str, calls: int) -> Callable[..., Any]:
    """A method of the work folder that ends the run when it was called a number of times."""
    original, done = getattr(WorkFolder, method), []

    def stopping(self: WorkFolder, name: str, compute: Callable[[], Step]) -> Any:
        if len(done) == calls:
            raise Killed
        done.append(name)
        return original(self, name, compute)

    return stopping


def outputs(directory: Path) -> tuple[Path, Path]:
    """Of the run that is not stopped, and of the one that is; each in a folder of its own."""
    for name in ("whole", "resumed"):
        (directory / name).mkdir()
    return directory / "whole" / "sparse", directory / "resumed" / "sparse"


@pytest.mark.parametrize(
    ("steps", "method"), [(1, WHOLE), (2, WHOLE), (3, WHOLE), (4, WHOLE), (5, WHOLE), (1, STREAMED)]
)
def test_resumes_to_the_same_bytes(
    steps: int,
    method: tuple[str, ...],
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, resumed = outputs(tmp_path)
    assert main(arguments(tiny_model_directory, text_file, whole, *method)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "step", kill_after("step", steps))
        with pytest.raises(Killed):
            main(arguments(tiny_model_directory, text_file, resumed, *method))
    assert not resumed.exists()
    assert len(list(resumed.parent.glob(".sparse.work/*.safetensors"))) == steps
    assert main(arguments(tiny_model_directory, text_file, resumed, *method, "--resume")) == 0
    for file in FILES:
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file
    assert [path.name for path in resumed.parent.iterdir()] == ["sparse"]


def test_finished_steps_are_not_computed_again(tmp_path: Path) -> None:
    def fail() -> Step:
        raise AssertionError

    first = WorkFolder(tmp_path / "work", "a", resume=False)
    tensors = {"x": torch.arange(6.0).reshape(2, 3).t()}
    first.step("one", lambda: Step(tensors, {"loss": 0.1}))
    again = WorkFolder(tmp_path / "work", "a", resume=True).step("one", fail)
    assert torch.equal(again.tensors["x"], tensors["x"])
    assert again.facts == {"loss": 0.1}


def test_steps_of_another_run_are_refused_or_removed(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", "a", resume=False).step("one", Step)
    with pytest.raises(OfflineError, match="another recipe, model, data set or version"):
        WorkFolder(tmp_path / "work", "b", resume=True)
    WorkFolder(tmp_path / "work", "b", resume=False)
    assert not (tmp_path / "work").exists()


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", "a", resume=False).step("one", Step)
    (tmp_path / "work" / "one.safetensors").write_bytes(b"nothing")
    with pytest.raises(OfflineError, match=r"one\.safetensors is no finished step"):
        WorkFolder(tmp_path / "work", "a", resume=True)


def test_a_real_kill_leaves_what_resume_needs(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    command = arguments(tiny_model_directory, text_file, tmp_path / "sparse", *STREAMED)
    program = (
        "import os, signal\n"
        "from permllm_offline.cli import main\n"
        "from permllm_offline.steps import WorkFolder\n"
        "original = WorkFolder.step\n"
        "def step(self, name, compute):\n"
        "    if name == 'layer-0001':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(self, name, compute)\n"
        "WorkFolder.step = step\n"
        f"main({json.dumps(command)})\n"
    )
    ended = subprocess.run([sys.executable, "-c", program], env=os.environ, check=False)
    assert ended.returncode == -9
    assert (tmp_path / ".sparse.work" / "layer-0000.safetensors").exists()
    assert main([*command, "--resume"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sparse"]


LEARNED = ("--method", "permllm-wanda", "--learn-scope", "window", "--learn-window", "1")
DISTILLED = ("--method", "permllm-best")


@pytest.mark.parametrize(
    ("intervals", "method"), [(1, LEARNED), (2, LEARNED), (3, LEARNED), (1, DISTILLED)]
)
def test_resumes_inside_a_long_step_to_the_same_bytes(
    intervals: int,
    method: tuple[str, ...],
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tmp_path / "short.yaml"
    distillation = {"steps": 4, "validation_interval": 2, "self_windows": 2, "learning_rate": 0.01}
    recipe.write_text(json.dumps({"distillation": distillation}), encoding="utf-8")
    short = ("--recipe", str(recipe), "--validation-interval", "2", "--steps", "4")
    more = (*method, *short, "--learning-rate", "0.3")
    whole, resumed = outputs(tmp_path)
    assert main(arguments(tiny_model_directory, text_file, whole, *more)) == 0
    with monkeypatch.context() as patch:
        patch.setattr(WorkFolder, "keep_interval", kill_after("keep_interval", intervals))
        with pytest.raises(Killed):
            main(arguments(tiny_model_directory, text_file, resumed, *more))
    kept = list(resumed.parent.glob(".sparse.work/*-interval.safetensors"))
    assert len(kept) == intervals % 2  # one that ended a window of layers is gone
    assert main(arguments(tiny_model_directory, text_file, resumed, *more, "--resume")) == 0
    for file in FILES:
        assert (whole / file).read_bytes() == (resumed / file).read_bytes(), file


def test_an_interval_takes_the_place_of_the_last_and_goes_with_its_step(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work", "a", resume=False)
    assert work.interval("one") is None
    for number in (1, 2):
        work.keep_interval("one", lambda number=number: Step(facts={"step": number}))
    again = WorkFolder(tmp_path / "work", "a", resume=True)
    kept = again.interval("one")
    assert kept is not None
    assert kept.facts == {"step": 2}
    again.step("one", Step)
    assert again.interval("one") is None
