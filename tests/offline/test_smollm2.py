"""SmolLM2-135M through the command line; short, so by Wanda only."""

import json
from pathlib import Path

import pytest

from benchmarks.models import smollm2
from benchmarks.texts import sotu
from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate
from tests.offline.recipe_lines import with_recipe

pytestmark = pytest.mark.model


def test_wanda_prunes_to_the_bytes_and_the_perplexity_that_are_known(tmp_path: Path) -> None:
    model, texts, output = smollm2(), sotu(), tmp_path / "sparse"
    data = ("--dataset", str(texts.calibration), "--num-samples", "8")
    options = ("--output", str(output), "--method", "wanda", *data)
    recipe = with_recipe(tmp_path / "recipe.yaml", {"evaluation_windows": 0})
    assert main(["prune", str(model), *options, *recipe]) == 0
    assert validate(output) == []
    assert json.loads((output / "report.json").read_text())["byte_ratio"] <= 0.57

    perplexities = []
    for checkpoint in (model, output):
        result = tmp_path / "result.json"
        held_out = ("--dataset", str(texts.held_out), "--max-windows", "8")
        assert main(["eval", str(checkpoint), *held_out, "--json", str(result)]) == 0
        perplexities.append(json.loads(result.read_text())["perplexity"])
    dense, sparse = perplexities
    assert 15 < dense < 35
    # Wanda without permutation: about six times dense at this size.
    assert 4 < sparse / dense < 9
