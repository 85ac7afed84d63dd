"""Which kinds of reconstruction depend on the seed beyond the choice of windows."""

from pathlib import Path

import pytest
import torch

from permllm_offline.preparation import Prepared, prepare
from permllm_offline.pruning import prune_model
from permllm_offline.recipe import Recipe, make_recipe
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS

SHORT = {"steps": 2, "windows_per_step": 2, "validation_windows": 2}


def weights(recipe: Recipe, prepared: Prepared, seed: int) -> dict[str, torch.Tensor]:
    """Of a model that was pruned with another seed, and the same windows."""
    return dict(prune_model(recipe.model_copy(update={"seed": seed}), prepared).model.state_dict())


@pytest.mark.parametrize("name", RECONSTRUCTIONS)
def test_weights_depend_on_the_seed_where_that_is_said(
    name: str, tiny_model_directory: Path, text_file: Path
) -> None:
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
    prepared = prepare(recipe)
    first, second = (weights(recipe, prepared, seed) for seed in (0, 1))
    differ = any(not torch.equal(first[tensor], second[tensor]) for tensor in first)
    assert differ == RECONSTRUCTIONS[name].seeded
