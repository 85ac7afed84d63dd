"""Random models in the shape of known ones: weights follow from names, and take little memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import models
from benchmarks.engines.quantized_peers import int4, int8
from benchmarks.models import random_model
from tests.resident_memory import ResidentGrowth

MIB = 1 << 20
SHAPE = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(models, "SHAPES", {"tiny": SHAPE})
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path))
    return tmp_path


def weights(model: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in model.glob("*.safetensors") for name, t in load_file(file).items()}


def test_weights_follow_from_their_names(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = weights(random_model("tiny"))
    norms = [name for name in found if "norm" in name]
    assert len(norms) == 2 * 2 + 1
    assert len(found) == 2 * 7 + len(norms) + 2
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    values = found["model.layers.0.mlp.up_proj.weight"].float()
    assert values.shape == (512, 256)
    assert float(values.std()) == pytest.approx(0.02, rel=0.02)
    twin = found["model.layers.0.mlp.gate_proj.weight"].float()
    assert abs(float((values * twin).mean())) < 0.02 * 0.02 * 0.02
    monkeypatch.setattr(models, "SHAPES", {"deeper": SHAPE | {"num_hidden_layers": 3}})
    again = weights(random_model("deeper", max_shard_bytes=MIB))
    assert len(again) == len(found) + 9
    assert all(torch.equal(again[name], tensor) for name, tensor in found.items())


def test_tied_weights_are_written_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "SHAPES", {"tied": SHAPE | {"tie_word_embeddings": True}})
    assert "lm_head.weight" not in weights(random_model("tied"))


def test_transformers_loads_it(cache: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(random_model("tiny", max_shard_bytes=MIB))
    found = weights(cache / "random-tiny")
    assert all(torch.equal(found[name], tensor) for name, tensor in model.named_parameters())


def test_files_are_no_larger_than_asked(cache: Path) -> None:
    model = random_model("tiny", max_shard_bytes=MIB // 2)
    index = json.loads((model / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(model).values())
    sizes = [file.stat().st_size for file in model.glob("*.safetensors")]
    assert len(sizes) > 5
    assert max(sizes) < MIB // 2 + 4096  # and a header


def test_a_large_model_is_made_in_little_memory(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = SHAPE | {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 20}
    monkeypatch.setattr(models, "SHAPES", {"tiny": SHAPE, "deep": deep})
    random_model("tiny")  # what is loaded once is no cost of the second
    growth = ResidentGrowth()
    model = random_model("deep", max_shard_bytes=4 * MIB)
    found = growth.peak_bytes()
    if found is None:
        pytest.skip("this system does not let a process reset its peak")
    assert sum(file.stat().st_size for file in model.glob("*.safetensors")) > 80 * MIB
    assert found < 24 * MIB


def test_what_is_there_is_not_made_anew(cache: Path) -> None:
    """A model that an older version made keeps its weights, and so do the variants beside it."""
    old = cache / "random-tiny"
    old.mkdir()
    (old / "config.json").write_text("{}")
    assert random_model("tiny") == old
    assert [path.name for path in old.iterdir()] == ["config.json"]


@pytest.mark.parametrize("peer", [int8, int4])
def test_peers_are_made_of_many_files_too(peer: Callable[[Path], Path], cache: Path) -> None:
    dense = random_model("tiny", max_shard_bytes=MIB // 2)
    twin = weights(peer(dense))
    assert torch.equal(twin["lm_head.weight"], weights(dense)["lm_head.weight"])
    assert len(twin) > len(weights(dense))
