"""A checkpoint of this format becomes a plain one in the original order of channels."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from permllm_offline import pipeline
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.report import page
from permllm_offline.report.papers import CARD, PAPERS
from permllm_vllm.checkpoint.errors import CheckpointError
from tests.conversion.sparse_models import (
    DOWN,
    O,
    load_all,
    permute,
    save_dense,
)


@pytest.fixture
def sparse(dense: Path, tmp_path: Path) -> Path:
    return permute(dense, tmp_path)[0]


@pytest.mark.parametrize(
    "geometry",
    [
        {"num_attention_heads": 2, "num_key_value_heads": 2},
        {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128, "hidden_size": 256},
        {"head_dim": 96, "attention_bias": True},
        {"head_dim": 32, "num_attention_heads": 4, "mlp_bias": True},
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ],
    ids=["mha", "two blocks a head", "blocks cross heads", "heads smaller than blocks", "biases"],
)
def test_every_geometry_comes_back(tmp_path: Path, geometry: dict[str, object]) -> None:
    dense = save_dense(tmp_path / "dense", **geometry)
    sparse, plain = permute(dense, tmp_path)
    convert_to_dense(str(sparse), tmp_path / "back")
    before, after = load_all(plain), load_all(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


def test_transformers_loads_it_and_no_trace_is_left(sparse: Path, tmp_path: Path) -> None:
    report = convert_to_dense(str(sparse), tmp_path / "back")
    assert {linear.permutation for linear in report.linears} == {"undone"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert type(model.model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert "quantization_config" not in json.loads((tmp_path / "back/config.json").read_text())


def test_papers_of_the_sparse_model_stay_behind(sparse: Path, tmp_path: Path) -> None:
    (sparse / "LICENSE").write_text("kept")
    for name in PAPERS:
        (sparse / name).write_text("---\nlicense: mit\n---\nof the sparse model")
    convert_to_dense(str(sparse), tmp_path / "back")
    left = {path.name for path in (tmp_path / "back").iterdir()}
    assert left & {"LICENSE", *PAPERS} == {"LICENSE", CARD}
    card = (tmp_path / "back" / CARD).read_text()
    assert "license: mit" in card
    assert "sparse as a plain Hugging Face checkpoint" in card


def test_the_report_of_a_conversion_stays_behind(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sparse / "conversion.json").write_text("{}")
    convert_to_dense(str(sparse), tmp_path / "back")
    assert not (tmp_path / "back" / "conversion.json").exists()
    # A prune of what an earlier version wrote leaves it out too.
    shutil.copy(sparse / "conversion.json", tmp_path / "back")
    monkeypatch.setattr(page, "_plots", lambda report: [])
    entries = {"model": str(tmp_path / "back"), "method": "magnitude", "evaluation_windows": 0}
    pipeline.prune(make_recipe(entries), tmp_path / "pruned")
    assert (tmp_path / "pruned" / "report.json").exists()
    assert not (tmp_path / "pruned" / "conversion.json").exists()


def test_int8_values_are_scaled_and_rounded_once(sparse: Path, tmp_path: Path) -> None:
    tensors = load_file(sparse / "model.safetensors")
    expected = {}
    generator = torch.Generator().manual_seed(0)
    for name in [n for n in tensors if n.endswith("weight_packed")]:
        shape = tensors[name].shape
        tensors[name] = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        scale = torch.rand(shape[0], generator=generator) + 0.5
        tensors[name.replace("weight_packed", "weight_scale")] = scale
        rounded = (tensors[name].float() * scale[:, None]).bfloat16()
        expected[name.replace("weight_packed", "weight")] = rounded.float().sum()
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((sparse / "config.json").read_text())
    config["quantization_config"]["value_dtype"] = "int8"
    (sparse / "config.json").write_text(json.dumps(config))
    convert_to_dense(str(sparse), tmp_path / "back")
    for name, weight in load_file(tmp_path / "back" / "model.safetensors").items():
        assert weight.dtype == torch.bfloat16
        if name in expected:
            assert float(weight.float().sum() - expected[name]) == pytest.approx(0, abs=1e-2)


def test_a_fold_that_heads_do_not_share_is_refused(sparse: Path, tmp_path: Path) -> None:
    tensors = load_file(sparse / "model.safetensors")
    name = f"model.layers.0.{O}.folded_permutation"
    tensors[name][:64] = torch.arange(64, dtype=torch.uint8)
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="cannot have been folded"):
        convert_to_dense(str(sparse), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_damaged_contents_are_refused(sparse: Path, tmp_path: Path) -> None:
    tensors = load_file(sparse / "model.safetensors")
    tensors[f"model.layers.1.{DOWN}.weight_mask"][3, 1] = 0b00010011
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.down_proj\.weight_mask: found 1 b"):
        convert_to_dense(str(sparse), tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_only_permllm_checkpoints_become_dense(dense: Path, sparse: Path, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match="is dense already: what becomes dense is"):
        convert_to_dense(str(dense), tmp_path / "back")
    with pytest.raises(OfflineError, match="of this format already"):
        convert_to_sparse(str(sparse), tmp_path / "again")
