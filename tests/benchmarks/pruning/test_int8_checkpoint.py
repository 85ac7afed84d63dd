"""Values of a pruned checkpoint, rounded afterwards, are those of a prune to int8 values."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.pruning.int8_checkpoint import write_int8
from permllm_offline.cli import main
from permllm_vllm.checkpoint.reader import CheckpointReader
from tests.offline.tiny_models import save_tokenizer, tiny_llama

SHORT = {
    "distillation": {
        "steps": 2,
        "validation_interval": 2,
        "self_windows": 2,
        "learning_rate": 0.01,
    }
}


@pytest.mark.parametrize("method", ["magnitude", "wanda+cp", "wanda/distillation"])
def test_it_is_that_of_a_prune_to_int8_values(
    method: str, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, recipe = tmp_path / "model", tmp_path / "recipe.yaml"
    tiny_llama().bfloat16().save_pretrained(model)
    save_tokenizer(model)
    recipe.write_text(json.dumps(SHORT))
    name, _, reconstruction = method.partition("/")
    options = ["--method", name, "--recipe", str(recipe), "--num-samples", "12"]
    options += ["--sequence-length", "24", "--evaluation-windows", "0"]
    if method != "magnitude":
        options += ["--dataset", str(text_file)]
    if reconstruction:
        options += ["--reconstruction", reconstruction]
    for values in ("auto", "int8"):
        output = ("--output", str(tmp_path / values), "--values", values)
        assert main(["prune", str(model), *output, *options]) == 0
    quantization = CheckpointReader(tmp_path / "auto").quantization
    assert bool(quantization.folded and quantization.runtime_permuted) is (name == "wanda+cp")
    write_int8(tmp_path / "auto", tmp_path / "rounded")
    expected, found = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("int8", "rounded")
    )
    assert set(found) == set(expected)
    for tensor, value in expected.items():
        torch.testing.assert_close(found[tensor], value, rtol=1e-5, atol=0)
    assert CheckpointReader(tmp_path / "rounded").config == (
        CheckpointReader(tmp_path / "int8").config
    )
    assert not (tmp_path / "rounded" / "report.json").exists()
