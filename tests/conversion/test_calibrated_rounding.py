"""Integers that are chosen with calibration text, of a permllm checkpoint and of other tools."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline import pipeline
from permllm_offline.cli import main
from permllm_offline.conversion.report import ConversionReport
from permllm_offline.conversion.to_sparse import Values, convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.inspection.verification import verify
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report import page
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from tests.conversion.sparse_models import (
    O,
    load_all,
    logits,
    permute,
    prune,
    quantization,
    same_weights,
    save_dense,
    write_bitmask,
    write_masks,
)
from tests.offline.baked_models import bake, decisions_of
from tests.offline.tiny_models import random_text, save_tokenizer, tiny_model

NORMS = ("input_layernorm", "post_attention_layernorm")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "calibration.txt"
    file.write_text(random_text(2000, seed=1), encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model whose layers read channels of very different sizes."""
    directory = save_dense(tmp_path_factory.mktemp("uneven") / "dense", attention_bias=True)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name, tensor in tensors.items():
        if name.removesuffix(".weight").endswith(NORMS):
            tensor *= torch.exp2(2 * torch.randn(len(tensor), generator=generator))
        if name.endswith("up_proj.weight"):
            tensor *= torch.exp2(2 * torch.randn(len(tensor), 1, generator=generator))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def recipe(text: Path, **entries: object) -> Recipe:
    few = {"dataset": str(text), "num_samples": 8, "sequence_length": 32}
    return Recipe(model="any", **(few | entries))


def error(found: Path, exact: Path) -> float:
    """Of the answers with the weights that are stored, activations as they are."""
    before = logits(exact)
    return float((logits(found) - before).norm() / before.norm())


@pytest.mark.parametrize("values", ["int8", "int4"])
def test_zeros_in_place_become_what_prune_makes_of_them(
    uneven: Path,
    text: Path,
    tmp_path: Path,
    values: Values,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Magnitudes find the zeros again, so `prune` measures the same model with the same text."""
    monkeypatch.setattr(page, "_plots", lambda report: [])
    source = prune(uneven, tmp_path / "source")
    entries = {"model": str(source), "method": "magnitude", "dataset": str(text), "values": values}
    few = {"num_samples": 8, "sequence_length": 32, "evaluation_windows": 0}
    pipeline.prune(make_recipe(entries | few), tmp_path / "pruned")
    convert_to_sparse(
        str(source), tmp_path / "out", strict=True, values=values, calibration=recipe(text)
    )
    assert same_weights(tmp_path / "out", tmp_path / "pruned")
    assert quantization(tmp_path / "out")["smoothed"]
    assert quantization(tmp_path / "out") == quantization(tmp_path / "pruned")
    assert verify(tmp_path / "out").problems == []


def test_only_norms_and_values_change(uneven: Path, text: Path, tmp_path: Path) -> None:
    sparse, _ = permute(uneven, tmp_path)
    report = convert_to_sparse(
        str(sparse), tmp_path / "out", values="int8", calibration=recipe(text)
    )
    expected = quantization(sparse) | {"value_dtype": "int8", "smoothed": True}
    assert quantization(tmp_path / "out") == expected
    before, after = load_all(sparse), load_all(tmp_path / "out")
    divided = 0
    for name, tensor in before.items():
        module, _, kind = name.rpartition(".")
        if module.endswith(NORMS):
            exponents = (tensor.float() / after[name].float()).log2()
            assert torch.equal(exponents, exponents.round())
            divided += bool(exponents.any())
        elif kind == "bias" and module.endswith("v_proj"):
            assert not torch.equal(after[name], tensor)  # its rows are divided
        elif kind != "weight_packed":
            assert torch.equal(after[name], tensor), name
    assert divided == 4
    assert report.to_dict() == json.loads((tmp_path / "out" / "conversion.json").read_text())
    densities = {one.name: one.density for one in report.linears}
    assert all(0.49 < density <= 0.5 for density in densities.values())
    assert "int8, with 256 tokens of calibration text" in report.rounding
    assert "inputs are smoothed" in report.rounding


def test_inputs_stay_as_they_are_without_smoothing(
    uneven: Path, text: Path, tmp_path: Path
) -> None:
    """Text alone chooses the scales then."""
    sparse, _ = permute(uneven, tmp_path)
    unsmoothed = recipe(text, smoothing=False)
    report = convert_to_sparse(str(sparse), tmp_path / "out", values="int8", calibration=unsmoothed)
    assert "inputs are as they were" in report.rounding
    assert quantization(tmp_path / "out") == quantization(sparse) | {"value_dtype": "int8"}
    convert_to_sparse(str(sparse), tmp_path / "alone", values="int8")
    before, after, alone = map(load_all, (sparse, tmp_path / "out", tmp_path / "alone"))
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, alone[name])}
    kinds = {name.rpartition(".")[2] for name in changed}
    assert kinds == {"weight_packed", "weight_scale"}
    for name in before.keys() - changed:
        assert torch.equal(after[name], before[name]) or name.endswith("weight_packed")


@pytest.mark.parametrize("model_type", ["phi3", "gemma2", "gpt_neox", "olmo2", "qwen3_moe"])
def test_families(tmp_path: Path, text: Path, model_type: str) -> None:
    """Fused linears, norms that add 1 or come after, experts.

    What is divided and multiplied alike changes no answer: what is left is the rounding.
    """
    model, pattern = tiny_model(model_type), Pattern(2, 4)
    bake(model, decisions_of(model, pattern, 64), pattern, 64, tmp_path / "baked")
    save_tokenizer(tmp_path / "baked")
    convert_to_sparse(str(tmp_path / "baked"), tmp_path / "alone", values="int8")
    rounding = error(tmp_path / "alone", tmp_path / "baked")
    assert 0 < rounding < 0.1
    output = tmp_path / "int8"
    convert_to_sparse(str(tmp_path / "baked"), output, values="int8", calibration=recipe(text))
    assert verify(output).problems == []
    assert error(output, tmp_path / "baked") < 2 * rounding


def test_a_layer_behind_a_dense_one_is_not_smoothed(
    uneven: Path, text: Path, tmp_path: Path
) -> None:
    """Nothing divides the rows of what stays dense."""
    gate_up = [(layer, f"mlp.{one}_proj") for layer in range(2) for one in ("gate", "up")]
    source = prune(uneven, tmp_path / "source", dense=gate_up)
    convert_to_sparse(str(source), tmp_path / "out", values="int8", calibration=recipe(text))
    assert quantization(tmp_path / "out")["smoothed"]
    before, after = load_all(source), load_all(tmp_path / "out")
    for layer in range(2):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(before[name], after[name])
    convert_to_sparse(str(source), tmp_path / "alone", values="int8")
    assert error(tmp_path / "out", source) < 2 * error(tmp_path / "alone", source)


@pytest.mark.parametrize("kind", ["bitmask", "masks"])
def test_other_forms_run_too(uneven: Path, text: Path, tmp_path: Path, kind: str) -> None:
    zeros = prune(uneven, tmp_path / "zeros")
    source, masks = zeros, None
    if kind == "bitmask":
        source = write_bitmask(zeros, tmp_path / "bitmask")
    else:
        kept = {name: tensor != 0 for name, tensor in load_all(zeros).items() if "_proj.w" in name}
        source, masks = uneven, str(write_masks(tmp_path / "m" / "mask_compressed.npz", kept))
    options: dict[str, Any] = {"values": "int8", "calibration": recipe(text)}
    convert_to_sparse(str(source), tmp_path / "out", masks=masks, strict=True, **options)
    convert_to_sparse(str(zeros), tmp_path / "same", strict=True, **options)
    assert same_weights(tmp_path / "out", tmp_path / "same")


def test_papers_say_it(uneven: Path, text: Path, tmp_path: Path) -> None:
    source = prune(uneven, tmp_path / "source")
    (source / "README.md").write_text("A model.\n")
    convert_to_sparse(str(source), tmp_path / "out", values="int8", calibration=recipe(text))
    card = " ".join((tmp_path / "out" / "README.md").read_text().replace("\n> ", " ").split())
    assert "were rounded to int8" in card
    assert "with 256 tokens of calibration text" in card
    assert "Relative error of a layer's output" in card


def test_what_cannot_be_used_is_refused(uneven: Path, text: Path, tmp_path: Path) -> None:
    source = prune(uneven, tmp_path / "source")
    wide = save_dense(tmp_path / "wide", head_dim=128, hidden_size=256, intermediate_size=256)
    permute(wide, tmp_path, block_size=128)

    def convert(given: Path, values: Values = "int8", **entries: object) -> ConversionReport:
        calibration = recipe(text, **entries)
        return convert_to_sparse(
            str(given), tmp_path / "out", values=values, calibration=calibration
        )

    with pytest.raises(OfflineError, match="permutations in blocks of 128 take apart"):
        convert(tmp_path / "sparse", "int4")
    with pytest.raises(OfflineError, match="has the model write none"):
        convert(source, dataset="self")
    with pytest.raises(OfflineError, match="names no data set"):
        convert(source, dataset=None)
    with pytest.raises(OfflineError, match="give --values int8 or int4 as well"):
        convert(source, "auto")
    with pytest.raises(OfflineError, match="is too short"):
        convert(source, num_samples=1000)
    (source / "tokenizer.json").unlink()
    with pytest.raises(OfflineError, match="tokenizer"):
        convert(source)
    tensors = load_file(source / "model.safetensors")
    weight = tensors[f"model.layers.1.{O}.weight"]
    weight[weight != 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    save_tokenizer(source)
    with pytest.raises(CheckpointError, match=rf"layers\.1\.{O}\.weight: found inf or nan"):
        convert(source)
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_taken_is_refused_before_the_work(
    uneven: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, (sparse, _) = prune(uneven, tmp_path / "source"), permute(uneven, tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    capsys.readouterr()
    for given in (source, sparse):
        with pytest.raises(CheckpointError, match="is not empty"):
            convert_to_sparse(str(given), tmp_path / "out", values="int8", calibration=recipe(text))
    assert "calibrate" not in capsys.readouterr().err


def test_on_the_command_line(
    uneven: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = prune(uneven, tmp_path / "source")

    def convert(*options: object) -> int:
        output = ["--output", str(tmp_path / "out"), "--force"]
        return main(["convert", str(source), *output, *map(str, options)])

    given = ("--values", "int8", "--dataset", text, "--num-samples", 8, "--sequence-length", 32)
    assert convert(*given) == 0
    shown = capsys.readouterr()
    assert "calibrate" in shown.err  # progress
    first = load_all(tmp_path / "out")
    convert_to_sparse(str(source), tmp_path / "same", values="int8", calibration=recipe(text))
    assert same_weights(tmp_path / "out", tmp_path / "same")
    reader = CheckpointReader(tmp_path / "out")
    assert reader.quantization is not None
    assert reader.quantization.smoothed

    assert convert(*given, "--no-smoothing") == 0
    reader = CheckpointReader(tmp_path / "out")
    assert reader.quantization is not None
    assert not reader.quantization.smoothed
    assert convert(*given, "--seed", 1) == 0
    assert any(not torch.equal(first[n], t) for n, t in load_all(tmp_path / "out").items())
    capsys.readouterr()

    assert convert("--dataset", text) == 2
    assert "give --values int8 or int4 as well" in capsys.readouterr().err
    assert convert("--dataset", text, "--to", "dense") == 2
    assert "--dataset is about the sparse checkpoint" in capsys.readouterr().err
    assert convert(*given, "--num-samples", 0) == 2
    assert "num" in capsys.readouterr().err
    assert convert("--values", "int8", "--no-smoothing", "--seed", 1) == 0
    assert "no text is read without --dataset: --seed, --smoothing is of no use" in caplog.text
