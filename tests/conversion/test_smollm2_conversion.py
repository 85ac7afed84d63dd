"""SmolLM2-135M, as each tool whose checkpoints are converted would have saved it."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from benchmarks.models import smollm2
from permllm_offline.cli import main
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import prune as prune_without_order
from tests.conversion.sparse_models import same_weights, write_bitmask
from tests.serving.checkpoints import prune

pytestmark = pytest.mark.model


def test_permutations_are_undone(tmp_path: Path) -> None:
    twins = prune(smollm2(), tmp_path)
    dense = tmp_path / "back"
    assert main(["convert", str(twins.sparse), "--to", "dense", "--output", str(dense)]) == 0
    assert same_weights(twins.dense, dense)


def test_zeros_in_place_and_bitmasks_go_there_and_back(tmp_path: Path) -> None:
    masked = prune_without_order(smollm2(), tmp_path / "masked")
    bitmask = write_bitmask(masked, tmp_path / "bitmask")
    made = []
    for source in (masked, bitmask):
        sparse, dense = (source.with_name(f"{source.name}-{kind}") for kind in ("2to4", "back"))
        assert main(["convert", str(source), "--output", str(sparse), "--strict"]) == 0
        assert validate(sparse) == []
        assert main(["convert", str(sparse), "--to", "dense", "--output", str(dense)]) == 0
        assert same_weights(masked, dense)
        made.append(load_file(sparse / "model.safetensors"))
    assert sum(name.endswith("weight_packed") for name in made[0]) == 210
    assert made[0].keys() == made[1].keys()
