import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.api import prune
from permllm_offline.forecast import memory_fit
from permllm_offline.forecast.memory import peak_bytes
from permllm_offline.forecast.memory_fit import (
    PROGRAM_BYTES,
    SMALLER,
    Fitted,
    fitted,
    warn_of_taken_memory,
)
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe

SIZES: dict[str, Any] = {"num_samples": 10, "sequence_length": 20, "evaluation_windows": 0}


@pytest.fixture
def fit(tiny_model_directory: Path, text_file: Path) -> Any:
    """Fit a recipe into the memory that it needs, or another does, or some bytes less."""

    def fit(
        *, less: int = 0, into: dict[str, Any] | None = None, device: str = "cpu", **options: Any
    ) -> Fitted:
        entries = {"model": str(tiny_model_directory), "dataset": str(text_file)} | SIZES
        recipe = make_recipe(entries | options)
        prepared = replace(prepare(recipe), device=torch.device(device))
        enough = recipe if into is None else make_recipe(entries | into)
        return fitted(recipe, prepared, PROGRAM_BYTES + peak_bytes(enough, prepared) - less)

    return fit


def test_what_fits_stays(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = fit()
    assert (found.recipe.method, found.recipe.reconstruction, found.note) == (
        "permllm-best",
        None,
        None,
    )
    assert caplog.messages == []


def test_a_default_that_does_not_fit_is_replaced(
    fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit(less=1)
    assert found.recipe.model_dump(include=set(SMALLER)) == SMALLER
    assert caplog.messages == [found.note]
    assert "permllm-best needs about" in found.note
    assert "--method wanda+cp --reconstruction obs+blockwise takes its place" in found.note


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ({"method": "permllm-best"}, "--scratch disk, which needs"),
        ({"reconstruction": "distillation"}, "--scratch disk, which needs"),
        ({"method": "permllm-best", "scratch": "disk"}, "--method wanda+cp --reconstruction obs"),
        ({"method": "wanda"}, "fewer --num-samples"),
    ],
)
def test_what_is_asked_for_is_never_replaced(
    asked: dict[str, str], remedy: str, fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {"scratch": "memory"} | asked
    found = fit(less=1, **asked)
    assert found.recipe.model_dump(include=set(asked)) == asked
    assert found.note is None
    (message,) = caplog.messages
    assert "it may be killed" in message
    assert f"The remedy is {remedy}" in message


@pytest.mark.parametrize("asked", [{"method": "permllm-best"}, {"reconstruction": "blockwise"}])
def test_what_is_asked_for_fits_with_files(
    asked: dict[str, str], fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit(less=1, **asked)
    assert found.recipe.model_dump(include=set(asked)) == asked
    assert found.recipe.scratch == "disk"
    assert caplog.messages == [found.note]
    assert "--scratch disk is taken" in found.note
    assert "The result is the same." in found.note


@pytest.mark.parametrize("asked", [{"method": "permllm-best"}, {"reconstruction": "blockwise"}])
def test_files_are_not_taken_where_they_do_not_suffice(
    asked: dict[str, str], fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    found = fit(less=1, into=asked | {"scratch": "disk"}, **asked)
    assert found.recipe.scratch == "memory"
    assert "it may be killed" in caplog.text


@pytest.mark.parametrize("scratch", [None, "memory", "disk"])
def test_what_replaces_the_default_takes_files_where_it_must(
    scratch: str | None, fit: Any, caplog: pytest.LogCaptureFixture
) -> None:
    asked = {} if scratch is None else {"scratch": scratch}
    found = fit(less=1, into={**SMALLER, "scratch": "memory"}, **asked)
    expected = {**SMALLER, "scratch": scratch or "disk"}
    assert found.recipe.model_dump(include=set(expected)) == expected
    assert caplog.messages == [found.note]
    options = "--method wanda+cp --reconstruction obs+blockwise"
    if scratch is None:
        options += " --scratch disk"
    assert f"{options} takes its place" in found.note
    assert ("in files beside the output" in found.note) == (scratch != "memory")
    assert ("It may be killed" in found.note) == (scratch == "memory")


def test_a_gpu_has_no_files(fit: Any, caplog: pytest.LogCaptureFixture) -> None:
    found = fit(less=1, method="permllm-best", device="cuda")
    assert found.recipe.scratch == "memory"
    assert "--scratch" not in caplog.text


@pytest.mark.parametrize(
    ("free", "total", "device", "warned"),
    [
        (-1, 0, "cpu", True),
        (0, 0, "cpu", False),
        (None, 0, "cpu", False),
        (-1, -1, "cpu", False),  # `fitted` has said it
        (-1, 0, "cuda", False),
    ],
)
def test_memory_that_others_hold_is_a_warning(
    free: int | None,
    total: int,
    device: str,
    warned: bool,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    entries = {"model": str(tiny_model_directory), "dataset": str(text_file)} | SIZES
    recipe = make_recipe(entries)
    prepared = replace(prepare(recipe), device=torch.device(device))
    needed = PROGRAM_BYTES + peak_bytes(recipe, prepared)
    left = None if free is None else needed + free
    monkeypatch.setattr(memory_fit, "free_bytes", lambda: left)
    monkeypatch.setattr(memory_fit, "memory_bytes", lambda _: needed + total)
    warn_of_taken_memory(recipe, prepared)
    assert len(caplog.messages) == warned
    if warned:
        assert "and other programs leave" in caplog.text
        assert "the remedy is --scratch disk, which" in caplog.text


def test_the_report_and_the_recipe_say_what_was_replaced(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(memory_fit, "memory_bytes", lambda device: 1)
    output = tmp_path / "sparse"
    constants = {"steps": 1, "windows_per_step": 1, "validation_windows": 1}
    with caplog.at_level(logging.WARNING):
        report = prune(
            tiny_model_directory, output, dataset=text_file, blockwise=constants, **SIZES
        )
    assert report.note is not None
    assert report.note in caplog.messages
    for file in ("report.json", "report.html"):
        assert "takes its place" in (output / file).read_text()
    assert (
        "method: wanda+cp\nreconstruction: obs+blockwise\n" in (output / "recipe.yaml").read_text()
    )
