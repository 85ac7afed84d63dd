"""What the table says of a kind of reconstruction is what it does."""

from pathlib import Path
from typing import Any

import pytest
import torch

from permllm_offline.preparation.prepared import Prepared, prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction import obs
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS

SHORT = {"steps": 2, "windows_per_step": 2, "validation_windows": 2}


def weights(recipe: Recipe, prepared: Prepared, seed: int) -> dict[str, torch.Tensor]:
    """Of a model that was pruned with another seed, and the same windows."""
    return dict(prune_model(recipe.model_copy(update={"seed": seed}), prepared).model.state_dict())


@pytest.fixture
def prepared_recipe(
    name: str, tiny_model_directory: Path, text_file: Path
) -> tuple[Recipe, Prepared]:
    entries = {
        "model": str(tiny_model_directory),
        "method": "wanda",
        "reconstruction": name,
        "dataset": str(text_file),
        "num_samples": 8,
        "sequence_length": 16,
        "evaluation_windows": 0,
        "blockwise": SHORT,
        "distillation": {**SHORT, "self_windows": 0},
    }
    recipe = make_recipe(entries)
    return recipe, prepare(recipe)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_weights_depend_on_the_seed_where_that_is_said(
    name: str, prepared_recipe: tuple[Recipe, Prepared]
) -> None:
    first, second = (weights(*prepared_recipe, seed) for seed in (0, 1))
    differ = any(not torch.equal(first[tensor], second[tensor]) for tensor in first)
    assert differ == (RECONSTRUCTIONS[name].tunes or RECONSTRUCTIONS[name].distils)


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_what_is_done_to_weights_is_what_is_said(
    name: str, prepared_recipe: tuple[Recipe, Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    factor, factored = obs.inverse_factor_, []

    def counted(*arguments: Any, **options: Any) -> None:
        factored.append(arguments)
        factor(*arguments, **options)

    monkeypatch.setattr(obs, "inverse_factor_", counted)
    report, kind = prune_model(*prepared_recipe).report, RECONSTRUCTIONS[name]
    assert bool(factored) == kind.updates
    assert any(error.curve for error in report.reconstruction) == kind.tunes
    assert bool(report.reconstruction_curve) == kind.distils
