"""Quantized models without their zeros, as compressed-tensors stored them, become sparse ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.model.quantized import require_dense
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.packing import pack_mask
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.shards import read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.compressed_tensors import written
from tests.conversion.marlin_models import rounded, write_marlin
from tests.conversion.sparse_models import (
    DOWN,
    LINEARS,
    QKV,
    in_place,
    prune,
    same_weights,
    set_config,
    write_bitmask,
)
from tests.offline.scaled_models import FORMS, write_scaled

OF_8_BITS = [
    name
    for name, form in FORMS.items()
    if "config_groups" in form.entries and form.packed_bits is None
]
NAMES = [f"model.layers.{layer}.{linear}" for layer in range(2) for linear in LINEARS]


@pytest.fixture(scope="module")
def pruned(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prune(dense, tmp_path_factory.mktemp("pruned") / "plain", in_place)


def changed(
    source: Path, target: Path, name: str, change: Callable[[Tensor], Tensor] | None
) -> Path:
    """A copy in which one tensor is another, or missing."""
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("form", OF_8_BITS)
def test_a_bitmask_of_8_bits(form: str, pruned: Path, tmp_path: Path) -> None:
    write_scaled(pruned, tmp_path / "scaled", tmp_path / "back", FORMS[form])
    source = write_bitmask(tmp_path / "scaled", tmp_path / "bitmask")
    report = convert_to_sparse(str(source), tmp_path / "out", strict=True)
    assert report.source_format == "compressed-tensors sparse-24-bitmask"
    assert validate(tmp_path / "out") == []
    convert_to_dense(str(tmp_path / "out"), tmp_path / "dense")
    assert same_weights(tmp_path / "dense", tmp_path / "back")
    stored = load_file(source / "model.safetensors")
    reader = CheckpointReader(tmp_path / "out")
    assert all(torch.equal(reader.layer(one).mask, stored[f"{one}.bitmask"]) for one in NAMES)


@pytest.mark.parametrize(
    ("bits", "group"), [(4, None), (4, 64), (8, None), (8, 64)], ids=lambda one: str(one)
)
def test_integers_of_sparse_marlin(
    bits: int, group: int | None, pruned: Path, tmp_path: Path
) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back", bits, group)
    report = convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out", strict=True)
    assert report.source_format == "compressed-tensors marlin-24"
    assert validate(tmp_path / "out") == []
    convert_to_dense(str(tmp_path / "out"), tmp_path / "dense")
    assert same_weights(tmp_path / "dense", tmp_path / "back")


@pytest.mark.parametrize(("bits", "values"), [(4, "int4"), (4, "int8"), (8, "int8")])
def test_values_are_the_integers_that_are_stored(
    bits: int, values: Literal["int4", "int8"], pruned: Path, tmp_path: Path
) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back", bits)
    report = convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out", values=values)
    assert {one.int8_error for one in report.linears} == {0.0}
    assert "every row was stored as integers" in report.rounding
    plain = load_file(pruned / "model.safetensors")
    reader = CheckpointReader(tmp_path / "out")
    for name in NAMES:
        integers, scale = rounded(plain[f"{name}.weight"], bits, None)
        assert int(integers.min()) == -(2 ** (bits - 1))
        layer = reader.layer(name)
        assert layer.scale is not None
        assert torch.equal(layer.scale, scale.float().flatten())
        assert layer.values.dtype == torch.int8
        assert torch.equal(layer.values, integers[unpacked(layer.mask)].view(layer.values.shape))


@pytest.mark.parametrize(("values", "least", "most"), [("int8", 1e-3, 0.01), ("int4", 0.01, 0.08)])
def test_scales_of_groups_become_one_for_the_row(
    values: Literal["int4", "int8"], least: float, most: float, pruned: Path, tmp_path: Path
) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back", group=32)
    report = convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out", values=values)
    convert_to_dense(str(tmp_path / "out"), tmp_path / "dense")
    before, after = (
        load_file(tmp_path / f"{name}/model.safetensors") for name in ("back", "dense")
    )
    for linear in report.linears:
        weight = before[f"{linear.name}.weight"].float()
        error = (after[f"{linear.name}.weight"].float() - weight).norm() / weight.norm()
        assert least < linear.int8_error < most
        assert float(error) == pytest.approx(linear.int8_error, rel=0.2)  # rounded to bfloat16


def unpacked(mask: Tensor) -> Tensor:
    """bool [out, in]."""
    bits = mask.unsqueeze(2) >> torch.arange(8) & 1
    return bits.bool().flatten(1)


@pytest.mark.parametrize("stored", ["with zeros", "without"])
def test_int8_weights_keep_their_integers(stored: str, pruned: Path, tmp_path: Path) -> None:
    write_scaled(pruned, tmp_path / "scaled", tmp_path / "back", FORMS["int8"])
    source = tmp_path / "scaled"
    if stored == "without":
        source = write_bitmask(tmp_path / "scaled", tmp_path / "bitmask")
    convert_to_sparse(str(source), tmp_path / "out", values="int8")
    tensors, reader = (
        load_file(tmp_path / "scaled/model.safetensors"),
        CheckpointReader(tmp_path / "out"),
    )
    for name in NAMES:
        layer, integers = reader.layer(name), tensors[f"{name}.weight"]
        assert layer.scale is not None
        assert torch.equal(layer.scale, tensors[f"{name}.weight_scale"].flatten())
        assert torch.equal(layer.values.flatten(), integers[unpacked(layer.mask)])


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8", "bfloat16"])
def test_a_bitmask_that_compressed_tensors_wrote(dtype: str, tmp_path: Path) -> None:
    found = written(f"bitmask_{dtype}")
    dense = found.pop("weight")
    save_file({f"a.{kind}": one for kind, one in found.items()}, tmp_path / "model.safetensors")
    files = BitmaskFiles(StoredFiles(tmp_path))
    assert files.names() == ["a.weight"]
    assert files.header("a.weight") == (dense.shape, dtype)
    assert torch.equal(files.part("a.weight", 0, dense.shape).float(), dense.float())
    some = files.part("a.weight", 3 * dense.shape[1], (2, dense.shape[1]))
    assert torch.equal(some.float(), dense[3:5].float())
    assert torch.equal(pack_mask(files.kept("a.weight")), found["bitmask"])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("meta", None, "q_proj.meta: found nothing; rule: a packed matrix has weight_packed, sc"),
        ("scale_packed", None, "q_proj.scale_packed: found nothing"),
        ("meta", lambda t: t.int(), r"q_proj.meta: found int32 of shape .*; rule: int16, two dim"),
        ("scale_packed", lambda t: t.float(), "q_proj.scale_packed: found float32"),
        ("weight_packed", lambda t: t.flatten(), r"weight_packed: found int32 of shape \[1024\]"),
        ("weight_packed", lambda t: t[:-1].clone(), r"weight_packed: found shape \[3, 256\]; rule"),
        ("weight_packed", lambda t: t[:, 2:].clone(), r"found shape \[4, 254\]; rule: \[4, 256\]"),
        ("scale_packed", lambda t: t[:, :96].clone(), "rule: .* for 96 rows, which are a multiple"),
        ("meta", lambda t: torch.zeros_like(t), "q_proj.meta: found a group of 4 with one "),
        ("meta", lambda t: torch.full_like(t, 0x1111), "q_proj.meta: found a group of 4 with one "),
        ("scale_packed", lambda t: t.repeat(2, 1), r"q_proj.weight_scale: found shape \[128, 2\]"),
        ("scale_packed", lambda t: t / 0, "q_proj.weight_scale: found nan or infinity"),
    ],
)  # fmt: skip
def test_damaged_integers_are_refused(
    pruned: Path,
    tmp_path: Path,
    kind: str,
    change: Callable[[Tensor], Tensor] | None,
    message: str,
) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back")
    name = f"model.layers.0.{QKV[0]}.{kind}"
    source = changed(tmp_path / "marlin", tmp_path / "source", name, change)
    with pytest.raises(CheckpointError, match=message):
        convert_to_sparse(str(source), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_rows_that_end_inside_a_tile_are_refused(pruned: Path, tmp_path: Path) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back")
    file, name = tmp_path / "marlin/model.safetensors", f"model.layers.0.{QKV[0]}"
    tensors = load_file(file)
    for kind, columns in (("weight_packed", 64), ("meta", 64), ("scale_packed", 32)):
        tensors[f"{name}.{kind}"] = tensors[f"{name}.{kind}"][:, :columns].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"rule: .* for 32 rows, which are a multiple of 64"):
        convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out")


def test_integers_beside_a_dense_weight_are_refused(pruned: Path, tmp_path: Path) -> None:
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back")
    file = tmp_path / "marlin/model.safetensors"
    tensors = load_file(file) | {f"model.layers.0.{DOWN}.weight": torch.zeros(1)}
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"down_proj\.weight: found a second"):
        convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out")


def test_float8_without_its_scales_is_refused(pruned: Path, tmp_path: Path) -> None:
    write_scaled(pruned, tmp_path / "scaled", tmp_path / "back", FORMS["channel"])
    write_bitmask(tmp_path / "scaled", tmp_path / "bitmask")
    name = f"model.layers.0.{QKV[0]}"
    source = changed(tmp_path / "bitmask", tmp_path / "one", f"{name}.weight_scale", None)
    with pytest.raises(CheckpointError, match="float8_e4m3fn without a scale"):
        convert_to_sparse(str(source), tmp_path / "out")
    said = {
        "quant_method": "compressed-tensors",
        "sparsity_config": {"format": "sparse-24-bitmask"},
    }
    set_config(tmp_path / "bitmask", quantization_config=said)
    with pytest.raises(CheckpointError, match=r"scale that config\.json says nothing"):
        convert_to_sparse(str(tmp_path / "bitmask"), tmp_path / "out")


@pytest.mark.parametrize("said", ["float16", None])
def test_the_dtype_is_that_of_the_model(said: str | None, pruned: Path, tmp_path: Path) -> None:
    """Of a `config.json` without one, that of the weights that are not quantized."""
    write_marlin(pruned, tmp_path / "marlin", tmp_path / "back")
    set_config(tmp_path / "marlin", dtype=said, torch_dtype=said)
    convert_to_sparse(str(tmp_path / "marlin"), tmp_path / "out")
    quantization = read_json(tmp_path / "out/config.json")["quantization_config"]
    assert quantization["value_dtype"] == (said or "bfloat16")


@pytest.mark.parametrize("layout", [["marlin-24"], {"a": 1}, 7])
def test_a_layout_that_is_no_text_is_refused(layout: object, pruned: Path, tmp_path: Path) -> None:
    said = {"quant_method": "compressed-tensors", "sparsity_config": {"format": layout}}
    write_bitmask(pruned, tmp_path / "bitmask")
    set_config(tmp_path / "bitmask", quantization_config=said)
    with pytest.raises(OfflineError, match=r"is stored as .*; read are plain weights"):
        convert_to_sparse(str(tmp_path / "bitmask"), tmp_path / "out")


@pytest.mark.parametrize("layout", ["marlin-24", "sparse-24-bitmask"])
def test_what_reads_dense_models_says_to_convert_them(
    layout: str, pruned: Path, tmp_path: Path
) -> None:
    if layout == "marlin-24":
        write_marlin(pruned, tmp_path / "source", tmp_path / "back")
    else:
        write_bitmask(pruned, tmp_path / "source")
    config = read_json(tmp_path / "source/config.json")
    with pytest.raises(OfflineError, match=f"stored as '{layout}': .*`permllm-offline convert`"):
        require_dense("sparse", config, "prune")
    with pytest.raises(CheckpointError, match=f"found '{layout}'.*`permllm-offline convert`"):
        CheckpointReader(tmp_path / "source")
