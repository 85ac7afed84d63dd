import json
import shutil
from itertools import product
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from permllm_offline import pipeline
from permllm_offline.cli import build_parser, main
from permllm_offline.recipe.methods import METHODS
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.validation import validate
from tests.offline.recipe_lines import Words, with_recipe
from tests.offline.tiny_models import save_tokenizer, tiny_llama

SIZES = ("--num-samples", "12", "--sequence-length", "24")


def prune(model: Path, output: Path, text: Path | None, *more: Words) -> int:
    data = () if text is None else ("--dataset", str(text))
    recipe = output.parent.parent / f"{output.parent.name}-recipe.yaml"
    options = with_recipe(recipe, {"learning": {"steps": 4}}, *more)
    return main(["prune", str(model), "--output", str(output), *SIZES, *data, *options])


WRITTEN = [name for name in METHODS if "global" not in name]
LOOSE = [(name, "8:16") for name in ("sparsegpt", "ria+cp-lsa", "permllm-wanda", "permllm-best")]
LOOSEST = [(name, "32:64") for name in ("sparsegpt", "wanda+cp", "permllm-best")]


@pytest.mark.parametrize(
    ("method", "pattern"), [*product(WRITTEN, ["2:4", "4:8"]), *LOOSE, *LOOSEST]
)
def test_prune_eval_and_inspect(
    method: str,
    pattern: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "sparse"
    options = ("--method", method, "--pattern", pattern)
    assert prune(tiny_model_directory, output, text_file, *options) == 0
    assert validate(output) == []
    config = json.loads((output / "config.json").read_text())["quantization_config"]
    permuted = pattern != "32:64" and ("cp" in method or "permllm" in method)
    assert config["pattern"] == pattern
    assert len(config["runtime_permuted"]) == (10 if permuted else 0)
    assert len(config["folded"]) == (4 if permuted else 0)
    assert config["ignore"] == ["lm_head"]

    report = json.loads((output / "report.json").read_text())
    assert len(report["layers"]) == 14
    assert 0.5 < report["byte_ratio"] <= 0.57
    assert report["perplexity_after"] > 1
    recipe = yaml.safe_load((output / "recipe.yaml").read_text())
    assert (recipe["method"], recipe["pattern"], recipe["seed"]) == (method, pattern, 0)
    card = (output / "README.md").read_text()
    assert "vllm serve sparse" in card
    assert f"{report['perplexity_after']:.2f}" in card
    assert str(tiny_model_directory) not in card
    page = (output / "report.html").read_text()
    assert f"{report['perplexity_after']:.2f}" in page
    assert str(tiny_model_directory) not in page
    assert (report["mask_example"] is not None) == permuted
    assert len(report["output_errors"]) == 2
    distils = method == "permllm-best"
    learns = method in ("permllm-wanda", "permllm-ria")
    assert len(report["reallocated_errors"]) == (2 if learns else 0)
    assert len(report["masked_errors"]) == (2 if distils else 0)
    if report["calibration"] is not None:
        assert report["calibration"]["own_windows"] == (64 if distils else 0)
    assert ("64 that the base model wrote itself" in card) == distils
    costs = json.loads((output / "costs.json").read_text())
    assert {"sparse-perplexity", "dense-perplexity"} < {step["name"] for step in costs["steps"]}

    result_file = tmp_path / "result.json"
    capsys.readouterr()
    arguments = ("--dataset", str(text_file), "--sequence-length", "24", "--max-windows", "5")
    assert main(["eval", str(output), *arguments, "--json", str(result_file)]) == 0
    result = json.loads(result_file.read_text())
    measured = {"perplexity", "windows", "sequence_length", "dataset", "protocol"}
    assert set(result) == measured | {"model"}
    assert result["protocol"] == "rows"
    assert (result["windows"], result["sequence_length"]) == (5, 24)
    assert json.loads(capsys.readouterr().out) == result

    assert main(["inspect", str(output), "--json", str(tmp_path / "inspected.json")]) == 0
    inspected = json.loads((tmp_path / "inspected.json").read_text())
    assert len(inspected["layers"]) == 14
    assert all(layer["density"] == 0.5 for layer in inspected["layers"])
    assert inspected["byte_ratio"] == pytest.approx(report["byte_ratio"])
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert ("folded" in shown) == permuted


@pytest.mark.parametrize("method", ["magnitude", "permllm-wanda"])
def test_int8_values(
    method: str, tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    text = None if method == "magnitude" else text_file
    output = tmp_path / "sparse"
    options = ("--method", method, "--values", "int8", "--dtype", "float32")
    assert prune(tiny_model_directory, output, text, *options) == 0
    assert validate(output) == []
    quantization = CheckpointReader(output).quantization
    assert quantization is not None
    assert quantization.value_dtype == "int8"
    report = json.loads((output / "report.json").read_text())
    assert report["byte_ratio"] < 0.2  # a quarter of half of the bytes, and a bit per weight
    assert all(0 < layer["rounding_error"] < 0.02 for layer in report["layers"])
    assert "int8, one scale per row" in (output / "README.md").read_text()

    planned = sum(layer["sparse_bytes"] for layer in report["layers"])
    tensors = load_file(output / "model.safetensors")
    kinds = ("weight_packed", "weight_mask", "permutation", "weight_scale")
    assert planned == sum(t.nbytes for name, t in tensors.items() if name.endswith(kinds))


@pytest.mark.parametrize("method", ["wanda", "permllm-wanda"])
def test_same_seed_same_bytes(
    method: str, tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    files = ("model.safetensors", "config.json", "recipe.yaml", "report.json")
    for name in ("first", "second"):
        folder = tmp_path / name / "sparse"
        assert prune(tiny_model_directory, folder, text_file, "--method", method) == 0
    for file in files:
        first, second = (tmp_path / name / "sparse" / file for name in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), file


def test_magnitude_needs_no_data(tmp_path: Path, tiny_model_directory: Path) -> None:
    output = tmp_path / "my model; 2:4"
    assert prune(tiny_model_directory, output, None, "--method", "magnitude") == 0
    card = (output / "README.md").read_text()
    assert "not measured" in card
    assert "\nVLLM_CPU_KVCACHE_SPACE=4 vllm serve 'my model; 2:4' --max-model-len " in card


def test_dtype_is_written_everywhere(
    tmp_path: Path, tiny_model_directory: Path, text_file: Path
) -> None:
    output = tmp_path / "out"
    options = ("--method", "wanda+cp", "--dtype", "bfloat16")
    assert prune(tiny_model_directory, output, text_file, *options) == 0
    config = json.loads((output / "config.json").read_text())
    assert config["dtype"] == config["quantization_config"]["value_dtype"] == "bfloat16"
    floating = {t.dtype for t in load_file(output / "model.safetensors").values()} - {torch.uint8}
    assert floating == {torch.bfloat16}


def test_a_dtype_that_no_checkpoint_holds_gives_way(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model_directory, model)
    widen(model)
    options = ("--method", "magnitude")
    assert prune(model, tmp_path / "out", None, *options, "--dry-run") == 2
    assert "give --dtype bfloat16 or float16 or float32" in capsys.readouterr().err
    options += ("--dtype", "float32")
    assert prune(model, tmp_path / "out", None, *options) == 0
    assert CheckpointReader(tmp_path / "out").quantization.value_dtype == "float32"


def test_tied_embeddings_are_written_once(tmp_path: Path, text_file: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path / "tied")
    save_tokenizer(tmp_path / "tied")
    assert prune(tmp_path / "tied", tmp_path / "out", text_file, "--method", "wanda") == 0
    assert "lm_head.weight" not in CheckpointReader(tmp_path / "out").names()
    arguments = ("--dataset", str(text_file), "--sequence-length", "24", "--max-windows", "2")
    assert main(["eval", str(tmp_path / "out"), *arguments]) == 0


def test_dry_run_writes_nothing(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prune(tiny_model_directory, tmp_path / "out", text_file, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    shown = capsys.readouterr().out
    assert "folded" in shown
    assert "nothing written" in shown
    shown = " ".join(shown.split())
    assert "GB of disk: the checkpoint, and what a run that is cut off goes on from" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--method", "sparsest"), "method 'sparsest' is not known: give one of magnitude, wanda"),
        (("--method", "ria+cp-global"), "inside blocks only"),
        (("--reconstruction", "best"), "reconstruction 'best' is not known: give one of none"),
        (("--pattern", "1:4"), "pattern '1:4' is not supported"),
        (({"block_size": 48},), "block size 48 is not supported"),
        (({"block_size": 128},), "192 input channels, which is not a multiple of the block"),
        (("--target", "tpu"), "target 'tpu' is not known: give one of auto, amx, cpu, gpu"),
        (("--num-samples", "0"), "--num-samples 0"),
        (("--num-samples", "5000"), "is too short: it gives"),
        (("--dtype", "int4"), "--dtype 'int4'"),
        (("--device", "toaster"), "device 'toaster' cannot be used"),
        (("--dataset", "./nowhere/text.txt"), "neither a local file or folder"),
    ],
)
def test_bad_options_are_refused(
    options: tuple[Words, ...],
    message: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prune(tiny_model_directory, tmp_path / "out", text_file, *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def remove(model: Path) -> None:
    shutil.rmtree(model)


def damage_config(model: Path) -> None:
    (model / "config.json").write_text("{")


def widen(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"dtype": "float64"}))


def damage_weights(model: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])


def rename_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})


def damage_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"model_type": "bloom"}))


def classify(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (model / "config.json").write_text(json.dumps(config))


def cut_short(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))


def link_weights(model: Path) -> None:
    elsewhere = model.with_name("elsewhere.safetensors")
    (model / "model.safetensors").rename(elsewhere)
    (model / "model.safetensors").symlink_to(elsewhere)


def link_tokenizer(model: Path) -> None:
    elsewhere = model.with_name("tokenizer.json")
    (model / "tokenizer.json").rename(elsewhere)
    (model / "tokenizer.json").symlink_to(elsewhere)


def damage_tokenizer(model: Path) -> None:
    for file in model.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, "is not a folder"),
        (damage_config, "no readable config.json"),
        (damage_weights, "cannot be opened"),
        (widen, "is of dtype float64 by its config.json"),
        (rename_weights, "stores no model.layers.0.self_attn.q_proj.weight"),
        (
            damage_family,
            "'bloom' is not supported: the table of model families has apertus, arcee, cohere, ",
        ),
        (cut_short, "but its config.json has 1 decoder layers. To prune a part"),
        (classify, "is a LlamaForSequenceClassification by its config.json"),
        (damage_tokenizer, "no readable tokenizer"),
        (link_weights, "model.safetensors: found a link to"),
        (link_tokenizer, "tokenizer.json: found a link to"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_bad_models_are_refused(
    damage: object,
    message: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(pipeline, "work_folder", lambda *_, **__: pytest.fail("work has begun"))
    model = tmp_path / "model"
    shutil.copytree(tiny_model_directory, model)
    damage(model)
    assert prune(model, tmp_path / "out", text_file, "--method", "wanda") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn = "permllm_offline.preparation.prepared.sample_windows"
    monkeypatch.setattr(drawn, lambda *_, **__: pytest.fail("text is drawn"))
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert prune(tiny_model_directory, tmp_path / "out", text_file, "--method", "wanda") == 2
    assert "disk" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_pruned_model_is_not_pruned_again(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prune(tiny_model_directory, tmp_path / "a", text_file, "--method", "wanda") == 0
    assert prune(tmp_path / "a", tmp_path / "b", text_file, "--method", "wanda") == 2
    assert "prune its dense original" in capsys.readouterr().err


def test_inspecting_other_weights_is_refused(
    tmp_path: Path, tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prune(tiny_model_directory, tmp_path / "a", None, "--method", "magnitude") == 0
    shutil.copy(tiny_model_directory / "model.safetensors", tmp_path / "a")
    assert main(["inspect", str(tmp_path / "a")]) == 2
    assert "but no sparse layer: its weights are of another checkpoint" in capsys.readouterr().err


def test_inspecting_a_dense_model_is_refused(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tiny_model_directory)]) == 2
    assert "dense model" in capsys.readouterr().err


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("prune", "eval", "inspect", "plan", "doctor"):
        with pytest.raises(SystemExit, match="0"):
            build_parser().parse_args([command, "--help"])
        assert "examples:" in capsys.readouterr().out


def test_names_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["prune", "model", "--dataset", "caf\udce9.txt", "--output", "sparse"])
    assert ended.value.code == 2
    assert "'caf\\udce9.txt' is not UTF-8: rename the file" in capsys.readouterr().err


def test_eval_measures_one_text(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "model", "--dataset", "a.txt", "--dataset", "b.txt"])
    assert "--dataset is given twice: measure one text" in capsys.readouterr().err
