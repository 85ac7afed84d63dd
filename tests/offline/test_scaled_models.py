"""A model in 8 bits is pruned, planned and measured as the dense model that it stands for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig, FineGrainedFP8Config

from permllm_offline.cli import main
from permllm_offline.disk_forecast import disk_bytes
from permllm_offline.memory_forecast import memory_forecast
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.stored import read_stored
from permllm_offline.preparation import prepare_model, windows_to_come
from permllm_offline.recipe import make_recipe
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.validation import validate
from tests.offline.scaled_models import (
    FINE,
    FORMS,
    STATIC,
    Form,
    fuse_scaled_experts,
    write_scaled,
)
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_model
from tests.offline.tiny_multimodal import tiny_multimodal

CPU = torch.device("cpu")
TUNED = "distillation: {steps: 2, validation_windows: 2, self_windows: 0, layer_windows: 4}\n"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(random_text(900, seed=3))
    return file


def save_dense(directory: Path, model_type: str, **sizes: object) -> Path:
    tiny_model(model_type, **sizes).to(torch.bfloat16).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module", params=FORMS)
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in 8 bits, and the dense one that it stands for, side by side."""
    place = tmp_path_factory.mktemp(request.param)
    dense = save_dense(place / "first", "llama")
    write_scaled(dense, place / "scaled", place / "dense", FORMS[request.param])
    return place


def pruned(place: Path, name: str, text: Path, *options: str) -> Path:
    output = place / "out" / name / "sparse"
    data = ("--dataset", str(text), "--num-samples", "6", "--sequence-length", "16", "--force")
    assert main(["prune", str(place / name), "--output", str(output), *data, *options]) == 0
    return output


def assert_pruned_alike(place: Path, text: Path, *options: str) -> Path:
    """The checkpoints are equal to the byte, but for what says of which model they are."""
    scaled, dense = (pruned(place, name, text, *options) for name in ("scaled", "dense"))
    assert {file.name for file in scaled.iterdir()} == {file.name for file in dense.iterdir()}
    for file in ("model.safetensors", "config.json", "SHA256SUMS"):
        assert (scaled / file).read_bytes() == (dense / file).read_bytes(), file
    assert validate(scaled) == []
    return scaled


@pytest.mark.parametrize("method", ["wanda+cp", "sparsegpt"])
def test_it_is_pruned_layer_by_layer(method: str, models: Path, text: Path) -> None:
    output = assert_pruned_alike(models, text, "--method", method)
    config = json.loads((output / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "permllm"
    assert config["dtype"] == config["quantization_config"]["value_dtype"] == "bfloat16"
    tensors = load_file(output / "model.safetensors")
    floating = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    assert floating == {torch.bfloat16}
    assert not [name for name in tensors if "scale" in name]


def test_it_is_pruned_as_a_whole(models: Path, text: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(TUNED)
    options = ("--method", "wanda+cp", "--reconstruction", "distillation")
    assert_pruned_alike(models, text, "--recipe", str(recipe), *options)


def test_layers_left_dense_are_products(models: Path, text: Path) -> None:
    options = ("--method", "magnitude", "--values", "int8", "--ignore", r"re:.*\.down_proj")
    output = assert_pruned_alike(models, text, *options)
    name = "model.layers.1.mlp.down_proj.weight"
    found, dense = (
        load_file(one / "model.safetensors")[name] for one in (output, models / "dense")
    )
    assert torch.equal(found, dense)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_another_dtype_is_not_rounded_twice(
    dtype: str, models: Path, text: Path, tmp_path: Path
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
    weight = stored[f"{name}.weight"].float()
    for axis, size in enumerate(weight.shape):
        if scale.dim() == 2 and scale.shape[axis] not in (1, size):
            scale = scale.repeat_interleave(128, axis).narrow(axis, 0, size)
    assert torch.equal(left, (weight * scale.float()).to(getattr(torch, dtype)))


def test_plan_and_forecast_are_those_of_the_dense_model(
    models: Path, text: Path, tmp_path: Path
) -> None:
    found = {}
    for name in ("scaled", "dense"):
        model, file = str(models / name), tmp_path / f"{name}.json"
        assert main(["plan", model, "--json", str(file)]) == 0
        plan = json.loads(file.read_text())
        assert plan.pop("model") == model
        recipe = make_recipe({"model": model, "dataset": str(text), "method": "wanda+cp"})
        prepared = prepare_model(recipe)
        prepared = replace(prepared, windows=windows_to_come(recipe))
        found[name] = plan, memory_forecast(recipe, prepared), disk_bytes(recipe, prepared)
    assert found["scaled"] == found["dense"]
    assert not [name for name in found["scaled"][0]["dense"] if "scale" in name]


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


@pytest.mark.parametrize("name", ["fine", "static", "channel", "tensor", "int8"])
def test_transformers_reads_the_same_weights(name: str, tmp_path: Path) -> None:
    """Of whole blocks: it splits a matrix with ragged edges otherwise."""
    form: Form = FORMS[name]
    said: Any = FineGrainedFP8Config(dequantize=True)
    if form.entries["quant_method"] == "compressed-tensors":
        # Scales are of the model's dtype there.
        form = replace(form, scale_dtype=torch.bfloat16)
        said = CompressedTensorsConfig(dequantize=True)
    dense = save_dense(tmp_path / "first", "llama", intermediate_size=256)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", form)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "scaled", dtype="auto", quantization_config=said
    )
    expected = theirs.state_dict()
    ours = load_model(open_source(str(tmp_path / "scaled")), torch.bfloat16, CPU)
    for weight, tensor in ours.state_dict().items():
        assert torch.equal(tensor, expected[weight]), weight


def test_eval_measures_the_dense_model(models: Path, text: Path, tmp_path: Path) -> None:
    found = {}
    for name in ("scaled", "dense"):
        file = tmp_path / f"{name}.json"
        asked = ("--dataset", str(text), "--sequence-length", "16", "--json", str(file))
        assert main(["eval", str(models / name), *asked]) == 0
        found[name] = json.loads(file.read_text())["perplexity"]
    assert found["scaled"] == found["dense"]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_experts(fused: bool, tmp_path: Path, text: Path) -> None:
    """One by one as Qwen publishes them, or in two tensors as Transformers saves some mixtures."""
    # Rows of gate are whole blocks here, so that joining them leaves every block as it was.
    dense = save_dense(tmp_path / "first", "qwen3_moe", moe_intermediate_size=128)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    if fused:
        fuse_scaled_experts(tmp_path / "scaled", "model.layers.0.mlp.experts", 4)
    assert_pruned_alike(tmp_path, text, "--method", "wanda+cp")


@contextmanager
def changed_config(directory: Path) -> Iterator[dict[str, Any]]:
    file = directory / "config.json"
    config = json.loads(file.read_text())
    yield config
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("inner", [False, True], ids=["outer", "inner"])
@pytest.mark.parametrize(
    ("model_type", "form"), [("mistral3", FORMS["static"]), ("qwen3_5", FORMS["fine"])]
)
def test_text_and_images(model_type: str, form: Form, inner: bool, tmp_path: Path) -> None:
    """The quantization stands at the top of config.json, or in that of the language model."""
    dense = tiny_multimodal(model_type, tmp_path / "first")
    text = tmp_path / "text.txt"
    text.write_text("Alice was beginning to get very tired of sitting by her sister. " * 40)

    def is_scaled(name: str) -> bool:
        return "language_model" in name and "_proj.weight" in name

    write_scaled(
        dense,
        tmp_path / "scaled",
        tmp_path / "dense",
        form,
        is_scaled,
        (lambda config: config["text_config"]) if inner else (lambda config: config),
    )
    output = assert_pruned_alike(tmp_path, text, "--method", "wanda+cp")
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config["text_config"]
    assert main(["plan", str(tmp_path / "scaled")]) == 0


def test_what_predicts_more_tokens_is_a_product_too(tmp_path: Path, text: Path) -> None:
    """As Qwen3.5's, whose draft head is in 8 bits and stays dense."""
    dense = save_dense(tmp_path / "first", "qwen3_5_text")
    file = dense / "model.safetensors"
    drafting = {
        "mtp.fc.weight": torch.randn(128, 256),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(192, 128),
    }
    save_file(load_file(file) | {n: t.bfloat16() for n, t in drafting.items()}, file)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    output = assert_pruned_alike(tmp_path, text, "--method", "magnitude")
    tensors = load_file(output / "model.safetensors")
    assert tensors["mtp.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


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


def test_what_older_versions_call_it(tmp_path: Path, text: Path) -> None:
    dense = save_dense(tmp_path / "first", "llama")
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["channel"])
    with changed_config(tmp_path / "scaled") as config:
        config["compression_config"] = config.pop("quantization_config")
    output = assert_pruned_alike(tmp_path, text, "--method", "magnitude")
    assert "compression_config" not in json.loads((output / "config.json").read_text())


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "convert"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "found float8_e4m3fn without a scale; rule: weights of 8 bits have a scale, and"),
        ({"quant_method": "gptq", "bits": 4}, "is quantized"),
        (FINE | {"weight_block_size": [64, 128]}, "found shape [1, 1]; rule: [2, 1] for a weight"),
        (STATIC, "found shape [2, 1]; rule: [1, 1] or [1] or [] for a weight of [192, 128] in bl"),
    ],
    ids=["unsaid", "gptq", "blocks", "tensor"],
)
def test_others_are_refused(
    command: str,
    entries: dict[str, Any] | None,
    message: str,
    tmp_path: Path,
    text: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dense = save_dense(tmp_path / "first", "llama")
    model = tmp_path / "scaled"
    write_scaled(dense, model, tmp_path / "dense", FORMS["fine"])
    with changed_config(model) as config:
        config["quantization_config"] = entries
    output = tmp_path / "out"
    asked = {
        "prune": ("--output", str(output), "--method", "magnitude"),
        "plan": (),
        "eval": ("--dataset", str(text), "--sequence-length", "16"),
        "convert": ("--output", str(output)),
    }
    assert main([command, str(model), *asked[command]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
