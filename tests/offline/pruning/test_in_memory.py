"""Pruning in memory, for methods whose result no checkpoint can hold, and for those that learn."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning import in_memory
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.run.steps import Work


def test_a_permutation_across_blocks_is_evaluated_in_memory(
    tiny_model_directory: Path, text_file: Path
) -> None:
    retained = {}
    for method in ("wanda", "wanda+cp-lsa", "wanda+cp-global"):
        recipe = make_recipe(
            {
                "model": str(tiny_model_directory),
                "method": method,
                "dataset": str(text_file),
                "num_samples": 8,
                "sequence_length": 24,
            }
        )
        pruned = prune_model(recipe, prepare(recipe))
        weight = pruned.model.model.layers[0].mlp.down_proj.weight
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert pruned.report.perplexity_after is not None
        retained[method] = torch.tensor(
            [layer.retained_importance for layer in pruned.report.layers]
        )
    assert retained["wanda"].mean() < retained["wanda+cp-lsa"].mean()
    # In the widest layer the channels have most places to go.
    assert retained["wanda+cp-lsa"][6] < retained["wanda+cp-global"][6]


@pytest.mark.parametrize(
    ("learning", "reconstruction", "kept"),
    [
        ({"scope": "window"}, "none", False),
        ({"scope": "window"}, "distillation", True),
        ({"scope": "window", "layers": "auto:1"}, "none", True),
        ({"scope": "model"}, "none", True),
    ],
)
def test_last_hidden_states_are_kept_only_where_something_reads_them(
    learning: dict[str, Any],
    reconstruction: str,
    kept: bool,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    collect = in_memory.collect

    def noted(*arguments: Any, **options: Any) -> Any:
        asked.append(options["hidden_states"])
        return collect(*arguments, **options)

    monkeypatch.setattr(in_memory, "collect", noted)
    recipe = make_recipe(
        {
            "model": str(tiny_model_directory),
            "method": "permllm-wanda",
            "reconstruction": reconstruction,
            "dataset": str(text_file),
            "num_samples": 8,
            "sequence_length": 16,
            "evaluation_windows": 0,
            "learning": {"steps": 1, **learning},
            "distillation": {"steps": 1, "self_windows": 0},
        }
    )
    report = prune_model(recipe, prepare(recipe)).report
    assert asked == [kept]
    assert report.learning_curve


def test_windows_of_both_kinds_are_mixed_and_layers_read_the_first(
    tiny_model_directory: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[str, Tensor] = {}
    calibrate, reconstruct_layers = in_memory.calibrate, in_memory.reconstruct_layers

    def calibrating(*arguments: Any) -> Any:
        calibrated = calibrate(*arguments)
        read["all"] = calibrated.windows
        return calibrated

    def reconstructing(calibrated: Any, *arguments: Any) -> Any:
        read["layers"] = calibrated.windows
        return reconstruct_layers(calibrated, *arguments)

    monkeypatch.setattr(in_memory, "calibrate", calibrating)
    monkeypatch.setattr(in_memory, "reconstruct_layers", reconstructing)
    recipe = make_recipe(
        {
            "model": str(tiny_model_directory),
            "method": "wanda",
            "reconstruction": "obs+distillation",
            "dataset": str(text_file),
            "num_samples": 8,
            "sequence_length": 16,
            "evaluation_windows": 0,
            "distillation": {"steps": 1, "self_windows": 6, "layer_windows": 3},
        }
    )
    prepared = prepare(recipe)
    own = prune_model(recipe, prepared).own_text
    assert prepared.windows is not None
    assert own is not None
    given = [*prepared.windows.calibration.tolist(), *own.tolist()]
    places = [given.index(window) for window in read["all"].tolist()]
    assert sorted(places) == list(range(8 + 6))
    assert min(places[8:]) < 8  # neither kind is kept for the end
    assert torch.equal(read["layers"], read["all"][:3])


@pytest.mark.parametrize("is_file", [False, True])
def test_a_file_named_self_is_a_data_set_like_others(
    is_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if is_file:
        (tmp_path / "self").write_text("text")
    seeds: list[int] = []

    def sample_text(*arguments: Any) -> Tensor:
        seeds.append(arguments[-1])
        return torch.zeros(1)

    monkeypatch.setattr(in_memory, "sample_text", sample_text)
    recipe = make_recipe({"model": "m", "dataset": "self", "seed": 3})
    prepared: Any = SimpleNamespace(windows=())
    in_memory.own_text(recipe, prepared, None, Work())
    assert (seeds == [3]) == is_file
