"""Sparse checkpoints of other tools become checkpoints of this format, value for value."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.conversion.verdicts import share_of_kept
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import open_source
from permllm_offline.model.quantized import require_dense
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.packing import pack_mask, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.shards import read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import (
    DOWN,
    GATE_UP,
    LINEARS,
    QKV,
    O,
    prune,
    same_weights,
    save_dense,
    set_config,
    write_bitmask,
)

CT = {"quant_method": "compressed-tensors"}


def permutations_of(report: object) -> dict[str, str]:
    return {linear.name: linear.permutation for linear in report.linears}


def check(source: Path, output: Path, back: Path) -> None:
    """The output is valid, and dense again it is the source."""
    assert validate(output) == []
    convert_to_dense(str(output), back)
    assert same_weights(source, back)
    config = json.loads((back / "config.json").read_text())
    assert "quantization_config" not in config
    source, back = (open_source(str(folder)) for folder in (source, back))
    assert back.dtype == source.dtype


@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (8, 16), (32, 64)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_zeros_in_place(tmp_path: Path, pattern: tuple[int, int], dtype: torch.dtype) -> None:
    dense = save_dense(tmp_path / "dense", dtype, attention_bias=True, mlp_bias=True)
    source = prune(dense, tmp_path / "source", *pattern)
    report = convert_to_sparse(str(source), tmp_path / "out")
    assert report.pattern == str(Pattern(*pattern))
    assert set(permutations_of(report).values()) == {"none"}
    assert {linear.density for linear in report.linears} == {0.5}
    assert (tmp_path / "out" / "tokenizer.json").exists()
    check(source, tmp_path / "out", tmp_path / "back")


def test_what_is_dense_stays_dense(
    dense: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = {(0, "mlp.up_proj"), (1, QKV[2])}
    source = prune(dense, tmp_path / "source", dense=skipped)
    with caplog.at_level(logging.WARNING):
        report = convert_to_sparse(str(source), tmp_path / "out")
    assert "5 of 14 linears stay dense" in caplog.text
    quantization = CheckpointReader(tmp_path / "out").quantization
    assert quantization is not None
    dense_names = [f"model.layers.0.{n}" for n in GATE_UP] + [f"model.layers.1.{n}" for n in QKV]
    assert sorted(quantization.ignore) == sorted(["lm_head", *dense_names])
    assert "up_proj keeps 100.0% of its weights" in report.left_dense[0].reason
    check(source, tmp_path / "out", tmp_path / "back")

    with pytest.raises(OfflineError, match=r"5 of 14 linears do not obey 2:4.*Leave out --strict"):
        convert_to_sparse(str(source), tmp_path / "strict", strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_dense_model_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"no linear .* obeys 2:4.*permllm-offline prune"):
        convert_to_sparse(str(dense), tmp_path / "out")


def test_a_classifier_is_refused(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["architectures"] = ["LlamaForSequenceClassification"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(OfflineError, match="head is neither calibrated nor served"):
        convert_to_sparse(str(source), tmp_path / "out")


def test_unstructured_zeros_are_refused(dense: Path, tmp_path: Path) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if "_proj" in name:
            smallest = tensor.abs().float().argsort(dim=1)[:, : tensor.shape[1] // 2]
            tensors[name] = tensor.scatter(1, smallest, 0)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        OfflineError,
        match=r"not 2:4 in the order .*-offline prune",
    ):
        convert_to_sparse(str(source), tmp_path / "out")


def test_a_group_with_fewer_weights_keeps_explicit_zeros(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source", 1, 4)
    report = convert_to_sparse(str(source), tmp_path / "out")
    assert {linear.density for linear in report.linears} == {0.25}
    check(source, tmp_path / "out", tmp_path / "back")


def test_negative_zeros_are_zeros(dense: Path, tmp_path: Path) -> None:
    """`weight * mask` leaves -0.0 where a negative weight was."""
    source = prune(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    originals = load_file(dense / "model.safetensors")
    masked = {n: originals[n] * (t != 0) if "_proj" in n else t for n, t in tensors.items()}
    assert any(bool((t[t == 0].signbit()).any()) for t in masked.values())
    save_file(masked, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_sparse(str(source), tmp_path / "out", strict=True)
    check(source, tmp_path / "out", tmp_path / "back")


@pytest.mark.parametrize(
    ("linear", "kind", "value"),
    [(DOWN, "weight", float("nan")), (O, "weight", float("-inf")), (QKV[1], "bias", float("inf"))],
)
def test_numbers_that_are_not_finite_are_refused(
    tmp_path: Path, linear: str, kind: str, value: float
) -> None:
    source = prune(save_dense(tmp_path / "dense", attention_bias=True), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.1.{linear}.{kind}"
    first = tensors[name].flatten().nonzero()[0]
    tensors[name].view(-1)[first] = value
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    message = rf"^{re.escape(name)}: found inf or nan; rule: finite numbers; remedy: .*again"
    with pytest.raises(CheckpointError, match=message):
        convert_to_sparse(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_several_dtypes_are_refused(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.1.{DOWN}.weight"
    tensors[name] = tensors[name].float()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OfflineError, match=f"{name} is float32; the format has one dtype"):
        convert_to_sparse(str(source), tmp_path / "out")


def test_a_missing_linear_is_named(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    del tensors[f"model.layers.1.{O}.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OfflineError, match=rf"model\.layers\.1\.{O}\.weight is not in the check"):
        convert_to_sparse(str(source), tmp_path / "out")


def test_a_model_saved_under_other_names_is_refused(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    save_file(bare, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OfflineError, match="no decoder layer under the names of its architecture"):
        convert_to_sparse(str(source), tmp_path / "out")


def test_bitmask(dense: Path, tmp_path: Path) -> None:
    plain = prune(dense, tmp_path / "plain")
    source = write_bitmask(plain, tmp_path / "bitmask", extra=("lm_head",))
    report = convert_to_sparse(str(source), tmp_path / "out", strict=True)
    assert report.source_format == "compressed-tensors sparse-24-bitmask"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "permllm"
    assert "sparsity_config" not in json.dumps(config)
    # Only the output head was compressed although it is dense: half of it is gone at the source.
    written = load_file(tmp_path / "out" / "model.safetensors")
    compressed = load_file(source / "model.safetensors")
    assert int((written["lm_head.weight"] != 0).sum()) == compressed["lm_head.compressed"].numel()
    for layer in range(2):
        for linear in LINEARS:
            name = f"model.layers.{layer}.{linear}"
            assert torch.equal(written[f"{name}.weight_packed"], compressed[f"{name}.compressed"])
            assert torch.equal(written[f"{name}.weight_mask"], compressed[f"{name}.bitmask"])


def test_bitmask_and_back(dense: Path, tmp_path: Path) -> None:
    plain = prune(dense, tmp_path / "plain")
    convert_to_sparse(str(write_bitmask(plain, tmp_path / "bitmask")), tmp_path / "out")
    check(plain, tmp_path / "out", tmp_path / "back")


def test_explicit_zeros_of_a_bitmask_stay_where_they_are(dense: Path, tmp_path: Path) -> None:
    source = write_bitmask(prune(dense, tmp_path / "plain"), tmp_path / "bitmask")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.{DOWN}"
    tensors[f"{name}.compressed"][:, ::5] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_sparse(str(source), tmp_path / "out")
    layer = CheckpointReader(tmp_path / "out").layer(name)
    assert torch.equal(layer.mask, tensors[f"{name}.bitmask"])
    assert int(unpack_mask(layer.mask).sum()) == layer.values.numel()


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("bitmask", None, r"q_proj.bitmask: found nothing"),
        ("shape", None, r"q_proj.shape: found nothing"),
        ("bitmask", lambda t: t[:-1].clone(), r"q_proj.bitmask: found shape \[127, 16\]"),
        ("compressed", lambda t: t[:, :-1].clone(), r"q_proj.compressed: found shape"),
        ("bitmask", lambda t: t.int(), r"q_proj.bitmask: found int32; rule: uint8"),
        ("shape", lambda t: torch.tensor([[128], [127]]), r"q_proj.shape: found \(128, 127\)"),
        ("shape", lambda t: t.double(), r"q_proj.shape: found float64 of shape"),
        ("shape", lambda t: t.flatten().repeat(9), r"q_proj.shape: found int64 of shape \[18"),
        (
            "bitmask",
            lambda t: t | 1 << 7,
            r"q_proj.bitmask: found 3 weights in group 1 of row",
        ),
    ],
    ids=[
        "no mask",
        "no shape",
        "short mask",
        "short values",
        "dtype",
        "odd shape",
        "real shape",
        "long shape",
        "bits",
    ],
)
def test_a_damaged_bitmask_is_refused(
    dense: Path, tmp_path: Path, kind: str, change: object, message: str
) -> None:
    source = write_bitmask(prune(dense, tmp_path / "plain"), tmp_path / "bitmask")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.{QKV[0]}.{kind}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, OfflineError), match=message):
        convert_to_sparse(str(source), tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_a_matrix_that_is_there_twice_is_refused(dense: Path, tmp_path: Path) -> None:
    source = write_bitmask(prune(dense, tmp_path / "plain"), tmp_path / "bitmask")
    tensors = load_file(source / "model.safetensors")
    tensors[f"model.layers.0.{DOWN}.weight"] = torch.zeros(1)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj.weight: found a second, dense weight"):
        convert_to_sparse(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "found gptq; rule: .*remedy: give the model from"),
        ({"quant_method": "fp8"}, "found fp8; rule: .*remedy: write it as a dense model first"),
        ({**CT, "config_groups": {"g": {}}}, "found compressed-tensors; .*convert --to dense`"),
        ({**CT, "sparsity_config": {"format": "sparse-bitmask"}}, "found sparse-bitmask; rule"),
        ({**CT, "format": "marlin-24"}, "found marlin-24; .*from before its quantization"),
        ({**CT, "sparsity_config": {"format": ["a"]}}, r"found \['a'\]; rule"),
    ],
)
def test_other_formats_are_refused(
    dense: Path, tmp_path: Path, entries: dict[str, object], message: str
) -> None:
    source = prune(dense, tmp_path / "source")
    set_config(source, quantization_config=entries)
    with pytest.raises(OfflineError, match=message):
        convert_to_sparse(str(source), tmp_path / "out")


def test_a_sparsity_config_that_says_dense_does_no_harm(dense: Path, tmp_path: Path) -> None:
    source = prune(dense, tmp_path / "source")
    dense_entries = {"format": "dense", "sparsity_structure": "2:4"}
    set_config(
        source,
        quantization_config={
            "quant_method": "compressed-tensors",
            "sparsity_config": dense_entries,
        },
    )
    convert_to_sparse(str(source), tmp_path / "out", strict=True)
    assert validate(tmp_path / "out") == []


def test_what_reads_dense_models_says_to_convert_a_bitmask(dense: Path, tmp_path: Path) -> None:
    source = write_bitmask(prune(dense, tmp_path / "plain"), tmp_path / "bitmask")
    config = read_json(source / "config.json")
    with pytest.raises(OfflineError, match=r"found sparse-24-bitmask; .*`permllm-offline convert`"):
        require_dense("sparse", config, "prune")
    with pytest.raises(CheckpointError, match=r"sparse-24-bitmask; .*`permllm-offline convert`"):
        CheckpointReader(source)


def test_a_bitmask_that_compressed_tensors_wrote(tmp_path: Path) -> None:
    """By its `Sparse24BitMaskCompressor`, version 0.12.2; some groups keep fewer than two."""
    tensors = load_file(Path(__file__).parent / "data" / "compressed_tensors.safetensors")
    dense = tensors.pop("weight")
    save_file({f"a.{kind}": one for kind, one in tensors.items()}, tmp_path / "model.safetensors")
    files = BitmaskFiles(StoredFiles(tmp_path))
    assert files.names() == ["a.weight"]
    assert files.header("a.weight") == (dense.shape, "bfloat16")
    assert torch.equal(files.part("a.weight", 0, dense.shape), dense)
    some = files.part("a.weight", 3 * dense.shape[1], (2, dense.shape[1]))
    assert torch.equal(some, dense[3:5])
    assert torch.equal(pack_mask(files.kept("a.weight")), tensors["bitmask"])


def test_values_of_8_bits_in_a_bitmask_are_refused(dense: Path, tmp_path: Path) -> None:
    source = write_bitmask(prune(dense, tmp_path / "plain"), tmp_path / "bitmask")
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.{DOWN}.compressed"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: found float8_e4m3fn; rule"):
        convert_to_sparse(str(source), tmp_path / "out")


def test_one_weight_more_than_half_shows_in_a_large_linear() -> None:
    """2 ** 24 + 1 is the first whole number that float32 does not have."""
    assert share_of_kept(torch.ones(0, 8, dtype=torch.bool)) == 0
    kept = torch.tensor([True, False]).repeat(2**12, 2**12)
    assert share_of_kept(kept) == 0.5
    kept[-1, -1] = True
    assert share_of_kept(kept) == 0.5 + 2**-25


@pytest.mark.parametrize("obeys", [False, True])
def test_layers_behind_the_model_stay(obeys: bool, dense: Path, tmp_path: Path) -> None:
    """Some predict more tokens: a checkpoint has them, and its model does not."""
    source = prune(dense, tmp_path / "source")
    weight = torch.randn(128, 128)
    weight[:, ::2] *= not obeys
    more = {
        "model.layers.2.self_attn.o_proj.weight": weight,
        "model.layers.2.enorm.weight": weight[0].clone(),
    }
    tensors = load_file(source / "model.safetensors") | more
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_to_sparse(str(source), tmp_path / "out", strict=True)
    assert validate(tmp_path / "out") == []
    reader = CheckpointReader(tmp_path / "out")
    assert reader.quantization is not None
    for name, tensor in more.items():
        assert torch.equal(reader.tensor(name), tensor)
        assert reader.quantization.is_ignored(name.removesuffix(".weight"))
