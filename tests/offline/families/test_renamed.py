"""Families of which Transformers renames parts: what is written has the names that were read."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from permllm_offline.api import prune
from permllm_offline.cli import main
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_integers import convert_to_integers
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.forecast.outline import outline
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.loading import load_model, load_served, open_source
from permllm_offline.model.stored import read_stored
from permllm_offline.preparation.prepared import prepare
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.text.evaluation import perplexity
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.validation import validate
from tests.offline.families.test_experts import METHODS, SIZES
from tests.offline.tiny_models import as_published, save_tokenizer, tiny_model

CPU = torch.device("cpu")
TOKENS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
RENAMED = [name for name, family in FAMILIES.items() if family.renamed]
FILE = "model.safetensors"
EXPERT = "model.layers.1.block_sparse_moe.experts.3"


def save(model_type: str, directory: Path) -> Path:
    as_published(tiny_model(model_type).to(torch.bfloat16)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


def assert_equal_answers(*models: Any) -> None:
    with torch.no_grad():
        first, *others = (model(TOKENS).logits.float() for model in models)
    for other in others:
        assert (other - first).abs().max() < 1e-4 * first.abs().max()


def modules(names: Any) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize("model_type", RENAMED)
def test_what_transformers_writes_is_what_is_read(model_type: str, tmp_path: Path) -> None:
    """Separate experts have the names that those in one parameter have, where these are saved."""
    tiny_model(model_type).to(torch.bfloat16).save_pretrained(tmp_path / "separate")
    whole = save(model_type, tmp_path / "whole")
    assert load_file(tmp_path / "separate" / FILE).keys() == load_file(whole / FILE).keys()
    ours = load_model(open_source(str(whole)), torch.float32, CPU)
    theirs = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float32).eval()
    assert_equal_answers(ours, theirs)


@pytest.mark.parametrize("model_type", RENAMED)
def test_names_stay_through_pruning_and_conversions(
    model_type: str, tmp_path: Path, text_file: Path
) -> None:
    source, sparse = save(model_type, tmp_path / "model"), tmp_path / "sparse"
    expected = outline(read_stored(str(source)), Pattern(2, 4), 64, "bfloat16", permuted=True)
    report = prune(source, sparse, dataset=text_file, method="wanda+cp", **SIZES)
    assert validate(sparse) == []
    reader, written = CheckpointReader(sparse), load_file(sparse / FILE)
    names = {one.name for one in expected.linears}
    assert set(reader.sparse_layers()) == names == {one.name for one in report.layers}
    assert modules(written) == modules(read_stored(str(source)).tensors)
    assert reader.quantization is not None
    assert {*reader.quantization.runtime_permuted, *reader.quantization.folded} == names
    masked = load_model(open_source(str(sparse)), torch.float32, CPU)
    assert_equal_answers(masked, load_served(open_source(str(sparse)), torch.float32, CPU))

    convert_to_dense(str(sparse), tmp_path / "dense")
    dense = load_file(tmp_path / "dense" / FILE)
    assert dense.keys() == load_file(source / FILE).keys()
    assert_equal_answers(
        masked, AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32).eval()
    )
    convert_to_integers(open_source(str(sparse)), tmp_path / "int8", "int8")
    assert validate(tmp_path / "int8") == []
    assert modules(load_file(tmp_path / "int8" / FILE)) == modules(written)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_mixtral(method: str, tmp_path: Path, text_file: Path) -> None:
    source = save("mixtral", tmp_path / "model")
    report = prune(source, tmp_path / "sparse", dataset=text_file, **SIZES, **METHODS[method])
    assert validate(tmp_path / "sparse") == []
    assert f"{EXPERT}.w2" in CheckpointReader(tmp_path / "sparse").sparse_layers()
    loaded = load_model(open_source(str(tmp_path / "sparse")), torch.bfloat16, CPU)
    held_out = prepare(report.recipe).windows.held_out
    assert perplexity(loaded, held_out) == pytest.approx(report.perplexity_after, rel=1e-2)


def test_a_run_that_was_cut_off_goes_on(
    tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save("mixtral", tmp_path / "model")
    ask = {"dataset": text_file, **SIZES, **METHODS["tuned"]}
    prune(source, tmp_path / "whole", **ask)
    with monkeypatch.context() as patched:
        resident = StreamedModel.resident

        def cut(self: StreamedModel, index: int) -> Any:
            if index == 1:
                raise KeyboardInterrupt
            return resident(self, index)

        patched.setattr(StreamedModel, "resident", cut)
        with pytest.raises(KeyboardInterrupt):
            prune(source, tmp_path / "cut", **ask)
    prune(source, tmp_path / "cut", **ask)
    assert (tmp_path / "cut" / FILE).read_bytes() == (tmp_path / "whole" / FILE).read_bytes()


def test_experts_are_left_dense_by_their_stored_names(tmp_path: Path, text_file: Path) -> None:
    source, output = save("mixtral", tmp_path / "model"), tmp_path / "sparse"
    ask = {"dataset": text_file, "method": "wanda+cp", **SIZES}
    with pytest.raises(OfflineError, match=r"matches no linear layer"):
        prune(source, output, ignore=[r"re:.*\.mlp\..*"], **ask)
    report = prune(source, output, ignore=[r"re:.*\.block_sparse_moe\.experts\..*"], **ask)
    assert f"{EXPERT}.w1" in report.left_dense
    models = [
        load(open_source(str(output)), torch.float32, CPU) for load in (load_model, load_served)
    ]
    assert_equal_answers(*models)


def test_a_layer_of_dense_experts_is_ignored_by_its_stored_name(
    tmp_path: Path, text_file: Path
) -> None:
    source = save("mixtral", tmp_path / "model")
    prune(source, tmp_path / "sparse", dataset=text_file, method="magnitude", **SIZES)
    convert_to_dense(str(tmp_path / "sparse"), tmp_path / "dense")
    file = tmp_path / "dense" / FILE
    tensors = load_file(file)
    tensors[f"{EXPERT}.w3.weight"] = load_file(source / FILE)[f"{EXPERT}.w3.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    report = convert_to_sparse(str(tmp_path / "dense"), tmp_path / "again")
    assert {one.name for one in report.left_dense} == {
        f"model.layers.1.block_sparse_moe.experts.{n}.{w}"
        for n in range(4)
        for w in ("w1", "w3", "w2")
    }
    (reason,) = {one.reason for one in report.left_dense}
    assert "block_sparse_moe.experts.3 cannot be sparse: block_sparse_moe.experts.3.w3" in reason
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    quantization = QuantizationConfig.from_dict(config["quantization_config"])
    assert r"re:model\.layers\.1\.block_sparse_moe\.experts\..*" in quantization.ignore
    assert validate(tmp_path / "again") == []


def test_experts_of_mixtral_in_one_tensor_are_refused(
    tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither Transformers nor vLLM would read them."""
    source = save("mixtral", tmp_path / "model")
    tensors = load_file(source / FILE)
    path = "model.layers.0.block_sparse_moe.experts"
    parts = [[tensors.pop(f"{path}.{n}.{kind}.weight") for n in range(4)] for kind in ("w1", "w3")]
    fused = [torch.cat(pair) for pair in zip(*parts, strict=True)]
    tensors[f"{path}.gate_up_proj"] = torch.stack(fused)
    save_file(tensors, source / FILE, metadata={"format": "pt"})
    output = ("--output", str(tmp_path / "sparse"))
    data = ("--dataset", str(text_file), "--num-samples", "4", "--sequence-length", "16")
    for method in ("wanda", "permllm-wanda"):
        assert main(["prune", str(source), *output, *data, "--method", method]) == 2
        assert f"{path}.0.w1.weight" in capsys.readouterr().err
    assert main(["convert", str(source), *output]) == 2
    assert "holds all experts of its layer in a form that is not read" in capsys.readouterr().err
