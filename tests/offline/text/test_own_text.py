"""Text that the dense model writes itself is calibration text like any other, made once."""

import json
from pathlib import Path

import pytest
import torch

from permllm_offline.cli import main
from permllm_offline.text import own_text
from permllm_offline.text.calibration import sample_windows


def test_a_prune_on_own_text(
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampled: list[int] = []
    original = own_text.sample_text

    def count(model: object, windows: int, length: int, seed: int) -> torch.Tensor:
        sampled.append(windows)
        return original(model, windows, length, seed)

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
