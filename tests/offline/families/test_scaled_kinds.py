"""Kinds of models in 8 bits, and what their files and `config.json` may say."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline.cli import main
from permllm_offline.model.stored import read_stored
from tests.offline.pruned_alike import (
    assert_measured_alike,
    assert_pruned_alike,
    changed_config,
    save_dense,
)
from tests.offline.scaled_models import (
    FINE,
    FORMS,
    STATIC,
    Form,
    add_tensors,
    fuse_scaled_experts,
    split_scales,
    write_scaled,
)
from tests.offline.tiny_multimodal import tiny_multimodal


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
def test_experts(fused: bool, tmp_path: Path, text_file: Path) -> None:
    """One by one as Qwen publishes them, or in two tensors as Transformers saves some mixtures."""
    # Rows of gate are whole blocks here, so that joining them leaves every block as it was.
    dense = save_dense(tmp_path / "first", "qwen3_moe", moe_intermediate_size=128)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    if fused:
        fuse_scaled_experts(tmp_path / "scaled", "model.layers.0.mlp.experts", 4)
    assert_pruned_alike(tmp_path, text_file, "--method", "wanda+cp")


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


def test_what_predicts_more_tokens_is_a_product_too(tmp_path: Path, text_file: Path) -> None:
    """As Qwen3.5's, whose draft head is in 8 bits and stays dense."""
    dense = save_dense(tmp_path / "first", "qwen3_5_text")
    file = dense / "model.safetensors"
    drafting = {
        "mtp.fc.weight": torch.randn(128, 256),
        "mtp.layers.0.mlp.up_proj.weight": torch.randn(192, 128),
    }
    save_file(load_file(file) | {n: t.bfloat16() for n, t in drafting.items()}, file)
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    output = assert_pruned_alike(tmp_path, text_file, "--method", "magnitude")
    tensors = load_file(output / "model.safetensors")
    assert tensors["mtp.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


def test_what_older_versions_call_it(tmp_path: Path, text_file: Path) -> None:
    dense = save_dense(tmp_path / "first", "llama")
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["channel"])
    with changed_config(tmp_path / "scaled") as config:
        config["compression_config"] = config.pop("quantization_config")
    output = assert_pruned_alike(tmp_path, text_file, "--method", "magnitude")
    assert "compression_config" not in json.loads((output / "config.json").read_text())


LAYER = "model.layers.1"
OF_OTHERS = [
    f"{LAYER}.self_attn.{kind}" for kind in ("kv_scale", "k_scale", "q_zero_point", "k_cache.scale")
]
OF_OTHERS += [f"{LAYER}.mlp.up_proj.{kind}_scale" for kind in ("input", "output_global")]


@pytest.mark.parametrize("name", ["tensor", "caches"])
def test_nothing_of_activations_and_caches_is_left(
    name: str, tmp_path: Path, text_file: Path
) -> None:
    """Else the pruned model could not be loaded, which has no place for it."""
    dense = save_dense(tmp_path / "first", "llama")
    form = FORMS["tensor"]
    if name == "caches":
        scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
        form = replace(
            form, entries=form.entries | {"config_groups": {}, "kv_cache_scheme": scheme}
        )
    write_scaled(
        dense,
        tmp_path / "scaled",
        tmp_path / "dense",
        form,
        is_scaled=lambda weight: name == "tensor" and "_proj." in weight,
    )
    add_tensors(tmp_path / "scaled", {one: torch.tensor(2.0) for one in OF_OTHERS})
    output = assert_pruned_alike(tmp_path, text_file, "--method", "magnitude")
    assert main(["plan", str(tmp_path / "scaled")]) == 0
    asked = ("--dataset", str(text_file), "--sequence-length", "16")
    assert main(["eval", str(output), *asked]) == 0


@pytest.mark.parametrize(
    "said",
    [
        {"compression_config": {"sparsity_config": {"format": "dense"}}},
        {"compression_config": {"quantization_config": {"config_groups": {}}}},
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "dense"}},
    ],
)
def test_what_quantizes_nothing_is_a_plain_model(
    said: dict[str, Any], tmp_path: Path, text_file: Path
) -> None:
    dense = save_dense(tmp_path / "dense", "llama")
    shutil.copytree(dense, tmp_path / "scaled")
    with changed_config(tmp_path / "scaled") as config:
        config |= said
    assert_pruned_alike(tmp_path, text_file, "--method", "magnitude")
    asked = ("--dataset", str(text_file), "--sequence-length", "16")
    for command in (["plan"], ["eval", *asked]):
        assert main([command[0], str(tmp_path / "scaled"), *command[1:]]) == 0


def test_scales_in_another_file(tmp_path: Path, text_file: Path) -> None:
    dense = save_dense(tmp_path / "first", "llama")
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    split_scales(tmp_path / "scaled")
    assert_pruned_alike(tmp_path, text_file, "--method", "wanda+cp")
    stored = read_stored(str(tmp_path / "scaled")).tensors
    assert stored == read_stored(str(tmp_path / "dense")).tensors


def test_latent_attention(tmp_path: Path, text_file: Path) -> None:
    """DeepSeek's own: 576 rows have a block at the edge, and a layer predicts one more token."""
    dense = save_dense(tmp_path / "first", "deepseek_v3", num_nextn_predict_layers=1)
    more = {
        "model.layers.2.eh_proj.weight": torch.randn(128, 256),
        "model.layers.2.mlp.experts.1.up_proj.weight": torch.randn(64, 128),
    }
    add_tensors(dense, {name: tensor.bfloat16() for name, tensor in more.items()})
    write_scaled(
        dense,
        tmp_path / "scaled",
        tmp_path / "dense",
        FORMS["fine"],
        lambda name: "layers." in name and "_proj" in name,
    )
    stored = load_file(tmp_path / "scaled" / "model.safetensors")
    latent = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[latent].shape[0] == 576
    assert stored[f"{latent}_scale_inv"].shape[0] == 5
    output = assert_pruned_alike(tmp_path, text_file, "--method", "wanda+cp")
    written, products = (
        load_file(one / "model.safetensors") for one in (output, tmp_path / "dense")
    )
    for name in ("model.layers.1.self_attn.kv_b_proj.weight", *more):
        assert stored[name].dtype == torch.float8_e4m3fn
        assert torch.equal(written[name], products[name])
    asked = ("--dataset", str(text_file), "--sequence-length", "16")
    assert main(["eval", str(output), *asked]) == 0


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", None])
def test_a_dtype_of_8_bits_is_how_it_is_stored(
    dtype: str | None, tmp_path: Path, text_file: Path
) -> None:
    """Nothing is computed in it: products are of bfloat16."""
    dense = save_dense(tmp_path / "first", "llama")
    write_scaled(dense, tmp_path / "scaled", tmp_path / "dense", FORMS["fine"])
    with changed_config(tmp_path / "scaled") as config:
        config["dtype"] = dtype
    assert_measured_alike(tmp_path, text_file, tmp_path)
    assert_pruned_alike(tmp_path, text_file, "--method", "magnitude")


def test_entries_that_are_no_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_dense(tmp_path / "model", "llama")
    with changed_config(model) as config:
        config["compression_config"] = "x"
    asked = ("--output", str(tmp_path / "out"))
    for command in (["convert", *asked], ["prune", *asked, "--method", "magnitude"], ["plan"]):
        assert main([command[0], str(model), *command[1:]]) == 2
        assert "config.json compression_config: found 'x'; rule: a JSON" in capsys.readouterr().err


def test_small_floats_by_other_names_are_found_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_dense(tmp_path / "model", "llama")
    add_tensors(model, {"tower.table": torch.ones(2, 2).to(torch.float8_e4m3fn)})
    asked = ("--output", str(tmp_path / "out"), "--method", "magnitude", "--dry-run")
    for command in (["prune", *asked], ["plan"]):
        assert main([command[0], str(model), *command[1:]]) == 2
        assert "tower.table: found float8_e4m3fn; rule: only" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["prune", "plan", "eval", "convert"])
@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (None, "found float8_e4m3fn with a scale that config.json says nothing of; rule: weights"),
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
    text_file: Path,
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
        "eval": ("--dataset", str(text_file), "--sequence-length", "16"),
        "convert": ("--output", str(output)),
    }
    assert main([command, str(model), *asked[command]]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not output.exists()
