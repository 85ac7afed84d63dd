"""A model in 8 bits is pruned, planned and measured as the dense model that it stands for."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from permllm_offline.cli import main
from permllm_offline.forecast.disk import disk_bytes
from permllm_offline.forecast.memory import memory_forecast
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.stored import read_stored
from permllm_offline.preparation.prepared import prepare_model, windows_to_come
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_vllm.checkpoint.shard import Shard
from tests.offline.pruned_alike import assert_measured_alike, assert_pruned_alike, save_dense
from tests.offline.scaled_models import FORMS, Form, write_scaled

CPU = torch.device("cpu")
TUNED = "distillation: {steps: 2, validation_windows: 2, self_windows: 0, layer_windows: 4}\n"


@pytest.fixture(scope="module", params=FORMS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in 8 bits, and the dense one that it stands for, side by side."""
    place = tmp_path_factory.mktemp(request.param)
    dense = save_dense(place / "first", "llama")
    write_scaled(dense, place / "scaled", place / "dense", FORMS[request.param])
    return place


@pytest.mark.parametrize("method", ["wanda+cp", "sparsegpt"])
def test_it_is_pruned_layer_by_layer(method: str, models: Path, text_file: Path) -> None:
    output = assert_pruned_alike(models, text_file, "--method", method)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "permllm"
    assert config["dtype"] == config["quantization_config"]["value_dtype"] == "bfloat16"
    tensors = load_file(output / "model.safetensors")
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    assert floating == {torch.bfloat16}
    assert not [name for name in tensors if "scale" in name]


def test_it_is_pruned_as_a_whole(models: Path, text_file: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TUNED)
    options = ("--method", "wanda+cp", "--reconstruction", "distillation")
    assert_pruned_alike(models, text_file, "--recipe", str(recipe), *options)


def test_layers_left_dense_are_products(models: Path, text_file: Path) -> None:
    options = ("--method", "magnitude", "--values", "int8", "--ignore", r"re:.*\.down_proj")
    output = assert_pruned_alike(models, text_file, *options)
    name = "model.layers.1.mlp.down_proj.weight"
    found, dense = (
        load_file(one / "model.safetensors")[name] for one in (output, models / "dense")
    )
    assert torch.equal(found, dense)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_not_rounded_twice(
    dtype: str, models: Path, text_file: Path, tmp_path: Path
) -> None:
    """Products of float32, which the weights of bfloat16 are not."""
    output = tmp_path / "sparse"
    asked = ("--output", str(output), "--method", "magnitude", "--dtype", dtype)
    ignore = ("--ignore", r"re:.*\.down_proj")
    assert main(["prune", str(models / "scaled"), *asked, *ignore]) == 0
    name = "model.layers.0.mlp.down_proj"
    left = load_file(output / "model.safetensors")[f"{name}.weight"]
    stored = load_file(models / "scaled" / "model.safetensors")
    [scale] = [
        stored[f"{name}.{one}"]
        for one in ("weight_scale", "weight_scale_inv")
        if f"{name}.{one}" in stored
    ]
    if "int4" in models.name:
        packed = stored[f"{name}.weight_packed"].unsqueeze(2)
        weight = ((packed >> torch.arange(0, 32, 4) & 15) - 8).flatten(1).float()
    else:
        weight = stored[f"{name}.weight"].float()
    for axis, size in enumerate(weight.shape):
        if scale.dim() == 2 and scale.shape[axis] not in (1, size):
            together = 64 if models.name.startswith(("group", "int4")) else 128
            scale = scale.repeat_interleave(together, axis).narrow(axis, 0, size)
    assert torch.equal(left, (weight * scale.float()).to(getattr(torch, dtype)))


def test_plan_and_forecast_are_those_of_the_dense_model(
    models: Path, text_file: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("scaled", "dense"):
        model, file = str(models / name), tmp_path / f"{name}.json"
        assert main(["plan", model, "--json", str(file)]) == 0
        plan = json.loads(file.read_text())
        assert plan.pop("model") == model
        recipe = make_recipe({"model": model, "dataset": str(text_file), "method": "wanda+cp"})
        prepared = prepare_model(recipe)
        prepared = replace(prepared, windows=windows_to_come(recipe))
        found[name] = plan, memory_forecast(recipe, prepared), disk_bytes(recipe, prepared)
    assert found["scaled"] == found["dense"]


def test_a_dry_run(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--output", str(tmp_path / "out"), "--method", "magnitude", "--dry-run")
    assert main(["prune", str(models / "scaled"), *asked]) == 0
    assert "peak memory about" in capsys.readouterr().out


@torch.no_grad()
def test_it_answers_as_the_dense_model(models: Path) -> None:
    tokens = torch.randint(2, 62, (2, 12), generator=torch.Generator().manual_seed(0))
    dense, *others = (
        load(open_source(str(models / name)), torch.bfloat16, CPU)(tokens).logits
        for load, name in ((load_model, "dense"), (load_model, "scaled"), (load_served, "scaled"))
    )
    assert all(torch.equal(answer, dense) for answer in others)


@pytest.mark.parametrize("name", FORMS)
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    """Of whole blocks: it splits a matrix with ragged edges otherwise."""
    form: Form = FORMS[name]
    said: Any = FineGrainedFP8Config(dequantize=True)
    if form.entries["quant_method"] == "compressed-tensors":
        # Scales are of the model's dtype there.
        form = replace(form, scale_dtype=torch.bfloat16)
        said = CompressedTensorsConfig(dequantize=True)
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
    dense = save_dense(tmp_path / "first", "llama", **sizes)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", form)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "scaled", dtype="auto", quantization_config=said
    )
    expected = theirs.state_dict()
    ours = load_model(open_source(str(tmp_path / "scaled")), torch.bfloat16, CPU)
    for weight, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[weight]), weight


def test_eval_measures_the_dense_model(models: Path, text_file: Path, tmp_path: Path) -> None:
    assert_measured_alike(models, text_file, tmp_path)


def test_of_a_hub_model_headers_are_those_of_the_dense_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = save_dense(tmp_path / "first", "llama")
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    local, shard = read_stored(str(tmp_path / "scaled")), tmp_path / "scaled/model.safetensors"
    entries = Shard(shard)._entries
    info = {
        name: SimpleNamespace(dtype=entry["dtype"], shape=entry["shape"])
        for name, entry in entries.items()
    }
    metadata = SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=info)})
    monkeypatch.setattr(
        "transformers.AutoConfig.from_pretrained", lambda name, **_: local.source.config
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, name: metadata
    )
    remote = read_stored("someone/tiny")
    assert remote.tensors == local.tensors == read_stored(str(tmp_path / "dense")).tensors
