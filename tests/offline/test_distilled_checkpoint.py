"""The whole line with a method that distils: recipe, own text, checkpoint, report."""

from pathlib import Path

import pytest
import torch

from permllm_offline.errors import OfflineError
from permllm_offline.pipeline import prune
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import EFFORTS, make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_vllm.checkpoint.packing import count_violations
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader


def test_the_pattern_holds_exactly_and_all_else_is_the_dense_model(
    tiny_model_directory: Path, text_file: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(
        {
            "model": str(tiny_model_directory),
            "method": "permllm-best",
            "dataset": str(text_file),
            "num_samples": 10,
            "sequence_length": 24,
            "learning": {"steps": 2, "validation_windows": 2},
            "distillation": {"steps": 3, "self_windows": 4, "learning_rate": 0.01},
        }
    )
    report = prune(recipe, tmp_path / "sparse")
    assert [entry["step"] for entry in report.reconstruction_curve] == [0, 1, 2, 3]
    reader, dense = CheckpointReader(tmp_path / "sparse"), CheckpointReader(tiny_model_directory)
    assert len(reader.sparse_layers()) == 14
    for name in reader.sparse_layers():
        layer = reader.layer(name)
        assert count_violations(layer.mask, Pattern(2, 4)) == 0
        assert layer.values.shape == (layer.out_features, layer.in_features // 2)
    kept = [name for name in dense.names() if "layers" not in name or "norm" in name]
    assert kept
    for name in kept:
        assert torch.equal(reader.tensor(name), dense.tensor(name)), name


def test_text_of_its_own_is_never_the_calibration_text_again(
    tiny_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recipe = make_recipe(
        {
            "model": str(tiny_model_directory),
            "method": "permllm-best",
            "dataset": "self",
            "num_samples": 10,
            "sequence_length": 24,
            "distillation": {"steps": 1, "self_windows": 6},
        }
    )
    prepared = prepare(recipe)
    own = prune_model(recipe, prepared).own_text
    assert own is not None
    assert prepared.windows is not None
    drawn = {tuple(window.tolist()) for window in prepared.windows.calibration}
    drawn |= {tuple(window.tolist()) for window in prepared.windows.held_out}
    assert len(own) == 6
    assert not drawn & {tuple(window.tolist()) for window in own}


def test_an_effort_fills_what_the_user_left_open() -> None:
    entries = {"model": "m", "method": "permllm-best"}
    for effort, constants in EFFORTS.items():
        recipe = make_recipe(entries, effort)
        assert recipe.num_samples == constants["num_samples"]
        assert recipe.distillation.steps == constants["distillation"]["steps"]
    own = make_recipe({**entries, "num_samples": 7, "distillation": {"steps": 5}}, "high")
    assert (own.num_samples, own.distillation.steps) == (7, 5)
    assert own.distillation.self_windows == EFFORTS["high"]["distillation"]["self_windows"]
    assert make_recipe({"model": "m", "method": "wanda"}, "high").num_samples == 128
    distilled = {"model": "m", "method": "wanda", "reconstruction": "distillation"}
    assert make_recipe(distilled, "low").distillation.steps == 150


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(OfflineError, match=r"effort 'huge' is not known: give one of low, default"):
        make_recipe({"model": "m", "method": "wanda"}, "huge")
