"""Against the hidden states that transformers itself gives."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch

from permllm_offline.model.families import FAMILIES
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.pruning.output_errors import WINDOWS, kept_outputs, output_errors
from permllm_offline.report.report import Report
from permllm_offline.run.steps import Work
from tests.offline.tiny_models import tiny_llama


def test_errors_are_those_of_the_hidden_states() -> None:
    dense, family = tiny_llama(num_hidden_layers=3).requires_grad_(False), FAMILIES["llama"]
    pruned = deepcopy(dense)
    for layer in pruned.model.layers:
        layer.mlp.up_proj.weight[:, ::2] = 0
    windows = torch.randint(0, 64, (WINDOWS + 1, 16), generator=torch.Generator().manual_seed(0))
    found = output_errors(pruned, family, windows, kept_outputs(Work(), dense, family, windows))
    assert len(found) == 3
    states = [
        model.model(windows[:WINDOWS], output_hidden_states=True).hidden_states
        for model in (dense, pruned)
    ]
    for index in (1, 2):  # the last one has passed the final norm
        wanted, mine = (state[index].double() for state in states)
        expected = float((mine - wanted).square().sum() / wanted.square().sum())
        assert found[index - 1] == pytest.approx(expected, rel=1e-4)
    assert found[2] > 0


def test_errors_before_learning_are_those_of_the_reallocation(
    tiny_model_directory: Path, text_file: Path
) -> None:
    def report_of(method: str) -> Report:
        recipe = make_recipe(
            {
                "model": str(tiny_model_directory),
                "method": method,
                "dataset": str(text_file),
                "num_samples": 8,
                "sequence_length": 16,
                "learning": {"steps": 3, "learning_rate": 1.0, "validation_interval": 1},
            }
        )
        return prune_model(recipe, prepare(recipe)).report

    reallocated, learned = report_of("wanda+cp"), report_of("permllm-wanda")
    assert list(learned.reallocated_errors) == pytest.approx(reallocated.output_errors, rel=1e-5)
    assert list(learned.output_errors) != pytest.approx(reallocated.output_errors, rel=1e-5)
    assert list(reallocated.reallocated_errors) == []
