"""A conversion with text that was cut off goes on, and writes what a whole one does."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from permllm_offline.cli import main
from permllm_offline.conversion import calibrated_rounding, to_integers, to_sparse
from permllm_offline.pruning.streamed_windows import Flow
from tests.conversion.sparse_models import (
    load_all,
    permute,
    prune,
    write_masks,
)
from tests.offline.tiny_models import random_text

SIZES = ("--num-samples", "8", "--sequence-length", "32")
LAYERS = 2


class CutOff(BaseException):
    """In place of a signal."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "calibration.txt"
    file.write_text(random_text(2000, seed=1), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def sources(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A sparse model of another tool, and the same in this format."""
    directory = tmp_path_factory.mktemp("sources")
    ours, _ = permute(dense, directory / "ours")
    return {"plain": prune(dense, directory / "plain"), "ours": ours}


Convert = Callable[..., int]


@pytest.fixture
def convert(sources: dict[str, Path], text: Path) -> Convert:
    """Convert a source on the command line."""

    def convert(source: str, output: Path, *more: str) -> int:
        data = ("--values", "int4", "--dataset", str(text), *SIZES)
        return main(["convert", str(sources[source]), "--output", str(output), *data, *more])

    return convert


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The decoder layers that the text has passed, in order."""
    found: list[int] = []
    whole = Flow.pass_dense

    def pass_dense(flow: Flow, index: int, layer: Any) -> None:
        found.append(index)
        whole(flow, index, layer)

    monkeypatch.setattr(Flow, "pass_dense", pass_dense)
    return found


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


def cut_off(*_: object, **__: object) -> Any:
    raise CutOff


@pytest.mark.parametrize(("source", "place"), [("plain", "second layer"), ("ours", "output")])
def test_a_conversion_that_was_cut_off_goes_on(
    convert: Convert,
    passed: list[int],
    tmp_path: Path,
    source: str,
    place: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, output = tmp_path / "whole" / "out", tmp_path / "out"
    whole.parent.mkdir()
    assert convert(source, whole) == 0
    assert passed == list(range(LAYERS))
    passed.clear()

    with monkeypatch.context() as patch:
        if place == "output":
            module = to_sparse if source == "plain" else to_integers
            patch.setattr(module, "write_checkpoint", cut_off)
        else:
            exact, calls = calibrated_rounding.choose_grids, iter(range(LAYERS))

            def choose(*arguments: Any, **options: Any) -> Any:
                return cut_off() if next(calls) else exact(*arguments, **options)

            patch.setattr(calibrated_rounding, "choose_grids", choose)
        with pytest.raises(CutOff):
            convert(source, output)
    assert "keeps the finished steps" in caplog.text
    assert not output.exists()
    passed.clear()
    caplog.clear()

    assert convert(source, output) == 0
    assert passed == ([] if place == "output" else [1])
    assert "goes on after the last decoder layer there" in caplog.text
    assert contents(output) == contents(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.fixture
def left(convert: Convert, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The work folder of a conversion to ``out`` that was cut off before it wrote."""
    with monkeypatch.context() as patch:
        patch.setattr(to_sparse, "write_checkpoint", cut_off)
        with pytest.raises(CutOff):
            convert("plain", tmp_path / "out")
    return tmp_path / ".out.work"


def test_what_another_conversion_left_is_refused(
    convert: Convert, left: Path, passed: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(left)
    assert convert("plain", left.with_name("out"), "--values", "int8") == 2
    assert "values is 'int4' there and 'int8' here" in capsys.readouterr().err
    assert contents(left) == before
    assert passed == []


def test_another_text_is_refused(
    convert: Convert, left: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though it has the same name."""
    before = text.read_text(encoding="utf-8")
    text.write_text(random_text(2000, seed=2), encoding="utf-8")
    try:
        assert convert("plain", left.with_name("out")) == 2
    finally:
        text.write_text(before, encoding="utf-8")
    assert "the calibration text is another" in capsys.readouterr().err


def test_other_masks_are_refused(
    dense: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Though their file has the same name, and the dense model is the same."""
    zeros = load_all(prune(dense, tmp_path / "zeros"))
    kept = {name: tensor != 0 for name, tensor in zeros.items() if "_proj.w" in name}
    masks = write_masks(tmp_path / "masks" / "mask_compressed.npz", kept)
    data = ("--values", "int8", "--dataset", str(text), *SIZES)
    line = ["convert", str(dense), "--masks", str(masks), "--output", str(tmp_path / "out"), *data]
    with monkeypatch.context() as patch:
        patch.setattr(to_sparse, "write_checkpoint", cut_off)
        with pytest.raises(CutOff):
            main(line)
    first = next(iter(kept))
    kept[first] = kept[first].roll(4, dims=1)
    write_masks(masks, kept)
    assert main(line) == 2
    assert "mask_compressed.npz is" in capsys.readouterr().err


def test_restart_begins_anew(convert: Convert, left: Path, passed: list[int]) -> None:
    assert convert("plain", left.with_name("out"), "--restart") == 0
    assert passed == list(range(LAYERS))
    assert not left.exists()
