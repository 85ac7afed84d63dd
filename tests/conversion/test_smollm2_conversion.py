"""SmolLM2-135M, permuted back to the original order of channels as PermLLM's authors save it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.models import smollm2
from permllm_offline.cli import main
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import same_weights
from tests.serving.checkpoints import prune

pytestmark = pytest.mark.model


def test_the_permutations_are_found_and_undone(tmp_path: Path) -> None:
    twins = prune(smollm2(), tmp_path)
    sparse, dense = tmp_path / "converted", tmp_path / "back"
    assert main(["convert", str(twins.dense), "--output", str(sparse), "--strict"]) == 0
    assert validate(sparse) == []
    made, found = (load_file(f / "model.safetensors") for f in (twins.sparse, sparse))
    assert made.keys() == found.keys()
    permutations = [name for name in made if name.endswith("_permutation")]
    assert len(permutations) == 210
    for name in permutations:
        assert torch.equal(found[name], canonical(made[name], 64, Pattern(2, 4)))
    assert main(["convert", str(sparse), "--to", "dense", "--output", str(dense)]) == 0
    assert same_weights(twins.dense, dense)
