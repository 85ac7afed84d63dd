import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from permllm_offline.cli import main
from permllm_offline.forecast.outline import outline
from permllm_offline.model.stored import read_stored
from permllm_offline.recipe.methods import METHODS
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.shard import Shard
from tests.offline.tiny_models import STRUCTURES, tiny_model


def plan(model: Path | str, output: Path, *options: str) -> dict:
    assert main(["plan", str(model), "--json", str(output), *options]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "8:16", "32:64"])
@pytest.mark.parametrize(
    ("method", "values"), [("magnitude", "int8"), ("wanda+cp", "bfloat16"), ("wanda+cp", "int4")]
)
def test_the_plan_is_what_prune_writes(
    method: str,
    values: str,
    pattern: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
) -> None:
    options = ("--method", method, "--pattern", pattern)
    found = plan(tiny_model_directory, tmp_path / "plan.json", *options, "--values", values)
    arguments = ("--dataset", str(text_file), "--num-samples", "4", "--sequence-length", "24")
    sparse = tmp_path / "sparse"
    command = ["prune", str(tiny_model_directory), "--output", str(sparse), "--dtype", "bfloat16"]
    command += ["--values", values] if values.startswith("int") else []
    assert main([*command, *options, *arguments]) == 0
    written = load_file(sparse / "model.safetensors")
    config = json.loads((sparse / "config.json").read_text())["quantization_config"]

    assert len(found["linears"]) == 14
    for linear in found["linears"]:
        tensors = {name: t for name, t in written.items() if name.startswith(linear["name"] + ".")}
        assert linear["bytes_after"] == sum(tensor.nbytes for tensor in tensors.values())
        assert linear["bytes_before"] == linear["out_features"] * linear["in_features"] * 4
        expected = "none"
        if linear["name"] in config["runtime_permuted"]:
            expected = "run time"
        elif linear["name"] in config["folded"]:
            expected = "folded"
        assert linear["permutation"] == expected
    stored = load_file(tiny_model_directory / "model.safetensors")
    assert found["bytes_before"] == sum(tensor.nbytes for tensor in stored.values())
    assert set(found["dense"]) == set(stored) & set(written)


@pytest.mark.parametrize("values", ["auto", "float32", "float16", "int8", "int4"])
def test_the_bytes_after_are_of_the_dtype_that_prune_writes(
    values: str, tmp_path: Path, tiny_model_directory: Path
) -> None:
    """Norms in another dtype than the rest stay so where none is asked for."""
    model = shutil.copytree(tiny_model_directory, tmp_path / "model")
    stored = load_file(model / "model.safetensors")
    stored = {name: t.half() if name.endswith("norm.weight") else t for name, t in stored.items()}
    save_file(stored, model / "model.safetensors")
    options = ("--method", "magnitude")
    found = plan(model, tmp_path / "plan.json", *options, "--values", values)
    options += ("--values", values) if not values.startswith("float") else ("--dtype", values)
    assert main(["prune", str(model), "--output", str(tmp_path / "sparse"), *options]) == 0
    written = load_file(tmp_path / "sparse" / "model.safetensors")
    assert found["bytes_before"] == sum(tensor.nbytes for tensor in stored.values())
    assert found["bytes_after"] == sum(tensor.nbytes for tensor in written.values())
    assert found["dense_after"] == {name: written[name].nbytes for name in found["dense"]}


def test_by_default_the_values_are_of_the_dtype_that_prune_writes(
    tmp_path: Path, tiny_model_directory: Path
) -> None:
    found = plan(tiny_model_directory, tmp_path / "plan.json")
    assert found["value_dtype"] == "float32"
    sparse = tmp_path / "sparse"
    magnitude = ("--method", "magnitude")
    assert main(["prune", str(tiny_model_directory), "--output", str(sparse), *magnitude]) == 0
    written = load_file(sparse / "model.safetensors")
    for values in ("auto", "float32"):
        found = plan(tiny_model_directory, tmp_path / "plan.json", *magnitude, "--values", values)
        assert found["bytes_after"] == sum(tensor.nbytes for tensor in written.values())


@pytest.mark.parametrize("family", STRUCTURES)
def test_every_family_is_planned(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "model")
    found = plan(tmp_path / "model", tmp_path / "plan.json")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert found["bytes_before"] == sum(tensor.nbytes for tensor in stored.values())
    pruned = {f"{linear['name']}.weight" for linear in found["linears"]}
    assert pruned == set(stored) - set(found["dense"])


def test_a_method_that_no_checkpoint_can_hold_is_refused(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    method = next(name for name in METHODS if "cp-global" in name)
    assert main(["plan", str(tiny_model_directory), "--method", method]) == 2
    assert "moves channels through a whole layer" in capsys.readouterr().err


def test_the_table_names_every_kind_of_tensor(
    tiny_model_directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(tiny_model_directory), "--values", "int8"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "model.layers.*.mlp.down_proj",
        "folded",
        "run time",
        "left dense",
        "lm_head.weight",
    ):
        assert text in shown


def write_hollow_model(directory: Path) -> int:
    """A large model whose weights are a hole in a file: whoever reads them reads gigabytes."""
    hidden, inner, vocabulary = 8192, 28672, 32000
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    config.save_pretrained(directory)
    shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    for layer in range(4):
        for name in "qkvo":
            shapes[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = (hidden, hidden)
        for name, shape in (("gate", (inner, hidden)), ("up", (inner, hidden))):
            shapes[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        shapes[f"model.layers.{layer}.mlp.down_proj.weight"] = (hidden, inner)
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def test_no_weight_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = write_hollow_model(tmp_path / "hollow")
    read: list[object] = []
    monkeypatch.setattr(Shard, "_read", lambda *place: read.append(place))
    found = plan(tmp_path / "hollow", tmp_path / "plan.json", "--values", "int8")
    assert read == []
    assert found["bytes_before"] == size
    assert 0.31 < found["bytes_after"] / size < 0.4


def change_config(model: Path, **entries: object) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | entries))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "permllm"}}, "already quantized or pruned"),
        ({"quantization_config": {"quant_method": "gptq"}}, "in a form that is not read"),
        ({"intermediate_size": 256}, "its config.json asks for [256, 8192]"),
        ({"num_hidden_layers": 5}, "stores nothing as model.layers.4.self_attn.q_proj.weight"),
        ({"model_type": "gpt2"}, "is not supported"),
        ({"architectures": ["LlamaForTokenClassification"]}, "head is neither calibrated nor"),
        ({"dtype": "float64"}, "no checkpoint holds: give --values bfloat16 or float16 or float32"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    entries: dict, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_hollow_model(tmp_path / "hollow")
    change_config(tmp_path / "hollow", **entries)
    assert main(["plan", str(tmp_path / "hollow")]) == 2
    assert message in capsys.readouterr().err


def test_of_a_hub_model_only_headers_are_fetched(
    monkeypatch: pytest.MonkeyPatch, tiny_model_directory: Path
) -> None:
    local = read_stored(str(tiny_model_directory))
    info = {
        name: SimpleNamespace(dtype="F32", shape=list(header.shape))
        for name, header in local.tensors.items()
    }
    metadata = SimpleNamespace(files_metadata={"a": SimpleNamespace(tensors=info)})

    def config(name: str, *, trust_remote_code: bool) -> object:
        assert not trust_remote_code
        return local.source.config

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", config)
    monkeypatch.setattr(
        huggingface_hub.HfApi, "get_safetensors_metadata", lambda self, name: metadata
    )
    remote = read_stored("someone/tiny")
    assert remote.tensors == local.tensors
    options = (Pattern(2, 4), 64, "bfloat16")
    assert outline(remote, *options, permuted=True).linears == (
        outline(local, *options, permuted=True).linears
    )


def test_an_unreachable_hub_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "someone/no-such-model"]) == 2
    assert "nor could its headers be fetched" in capsys.readouterr().err
