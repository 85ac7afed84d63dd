"""Text that the dense model writes itself is calibration text like any other, made once."""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from permllm_offline.cli import main
from permllm_offline.model.loading import open_source
from permllm_offline.text import own_text
from permllm_offline.text.windows import sample_windows


def test_a_prune_on_own_text(
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampled: list[int] = []
    original = own_text.sample_text

    def count(model: object, windows: int, *more: Any) -> torch.Tensor:
        sampled.append(windows)
        return original(model, windows, *more)

    monkeypatch.setattr(own_text, "sample_text", count)
    options = ("--dataset", "self", "--method", "wanda", "--num-samples", "5")
    perplexities = []
    for name in ("first", "second"):
        arguments = ["prune", str(tiny_model_directory), "--output", str(tmp_path / name)]
        assert main([*arguments, *options, "--sequence-length", "12"]) == 0
        report = json.loads((tmp_path / name / "report.json").read_text())
        perplexities.append(report["perplexity_before"])
        assert "from `self`" in (tmp_path / name / "README.md").read_text()
    assert sampled == [5 + 8]  # calibration and held-out windows, in one go, once
    assert perplexities[0] == perplexities[1]

    (kept,) = (tmp_path / "cache").rglob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-3])
    assert main([*arguments, *options, "--sequence-length", "12", "--force"]) == 2
    assert f"the kept text {kept} is damaged: delete it" in capsys.readouterr().err


def test_own_text_shares_the_windows_with_other_sources(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    drawn = sample_windows(
        ["self", str(text_file)],
        AutoTokenizer.from_pretrained(tiny_model_directory),
        num_samples=4,
        sequence_length=8,
        seed=0,
        num_held_out=2,
        own_text=lambda count: torch.full((count, 8), 63),
    )
    assert int((drawn.calibration == 63).all(1).sum()) == 2
    assert int((drawn.held_out == 63).all(1).sum()) == 1


def sampled(model: Path) -> torch.Tensor:
    source, device = open_source(str(model)), torch.device("cpu")
    return own_text.OwnText(source, torch.float32, device, 12, seed=3).windows(2)


def fail_to_save(*_: object) -> None:
    raise SafetensorError("No space left on device")


@pytest.mark.parametrize("place", ["no folder", "full disk"])
def test_text_that_cannot_be_kept_is_used_all_the_same(
    place: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    if place == "no folder":
        cache.write_text("a file where the folder should be")
    else:
        monkeypatch.setattr(own_text, "save_file", fail_to_save)
    assert sampled(tiny_model_directory).shape == (2, 12)
    assert f"cannot be kept in {cache / 'permllm' / 'sampled'}" in caplog.text


def test_what_was_half_kept_is_removed(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: dict[str, torch.Tensor], file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError("full")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(own_text, "save_file", half)
    sampled(tiny_model_directory)
    assert list((tmp_path / "permllm" / "sampled").iterdir()) == []


def test_only_files_that_are_read_name_the_kept_text(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of one file the name is what it always was, so that what was kept is found."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    weights = model / "model.safetensors"
    state: Any = weights.stat()
    text = f"torch.float32 cpu 12 3 2{weights.resolve()} {state.st_size} {state.st_mtime_ns}"
    name = f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    first = sampled(model)
    assert [file.name for file in cache.rglob("*.safetensors")] == [name]
    shutil.copy(weights, model / "consolidated.safetensors")
    monkeypatch.delattr(own_text, "sample_text")
    assert torch.equal(sampled(model), first)
