"""Kept values become integers on the way, of a permllm checkpoint and of other tools."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from permllm_offline.conversion.report import ConversionReport
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import Values, convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.inspection.verification import verify
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from tests.conversion.sparse_models import (
    DOWN,
    LINEARS,
    O,
    load_all,
    logits,
    permute,
    prune,
    quantization,
    same_weights,
    save_dense,
    set_config,
    write_bitmask,
)
from tests.conversion.test_experts import one_dense_expert, save_mixture

CHANGED = ("weight_packed", "weight_scale")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A permuted model with biases in float32, `sparse`; in original order, `plain`."""
    place = tmp_path_factory.mktemp("int8")
    permute(save_dense(place / "dense", torch.float32, attention_bias=True), place)
    return place


@pytest.fixture(scope="module")
def report(place: Path) -> ConversionReport:
    """Of the conversion of `sparse` to `int8`."""
    return convert_to_sparse(str(place / "sparse"), place / "int8", values="int8")


def parts(name: str) -> tuple[str, str]:
    module, _, kind = name.rpartition(".")
    return module, kind


def check_the_rest(before: dict[str, Tensor], after: dict[str, Tensor]) -> None:
    """All but kept values and their scales is there with the same bits."""
    rest = {name for name in before if parts(name)[1] not in CHANGED}
    assert rest == {name for name in after if parts(name)[1] not in CHANGED}
    for name in rest:
        assert before[name].dtype == after[name].dtype, name
        assert torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_alone_change_by_half_a_step(tmp_path: Path, dtype: torch.dtype) -> None:
    dense = save_dense(tmp_path / "dense", dtype, attention_bias=True)
    permute(dense, tmp_path)
    report = convert_to_sparse(str(tmp_path / "sparse"), tmp_path / "int8", values="int8")
    assert verify(tmp_path / "int8").problems == []
    assert verify(tmp_path / "int8").checksums
    expected = quantization(tmp_path / "sparse") | {"value_dtype": "int8"}
    assert quantization(tmp_path / "int8") == expected
    assert {"folded", "run time"} <= {linear.permutation for linear in report.linears}

    before, after = load_all(tmp_path / "sparse"), load_all(tmp_path / "int8")
    check_the_rest(before, after)
    errors = {linear.name: linear.rounding_error for linear in report.linears}
    for name, values in before.items():
        module, kind = parts(name)
        if kind != "weight_packed":
            continue
        integers, scale = after.pop(name), after[f"{module}.weight_scale"][:, None]
        assert integers.dtype == torch.int8
        error = values.float() - integers.float() * scale
        inside = integers.abs() < 127
        assert (error.abs() <= scale * 0.5001)[inside].all()
        assert inside.float().mean() > 0.95  # a clip may pay, of few
        assert errors.pop(module) == pytest.approx(
            float(error.norm() / values.float().norm()), rel=1e-4
        )
    assert errors == {}
    assert len(report.linears) == 2 * len(LINEARS)


def test_int4_values_take_half_a_byte_in_the_order_that_is_stored(
    place: Path, tmp_path: Path
) -> None:
    report = convert_to_sparse(str(place / "sparse"), tmp_path / "out", values="int4")
    assert "int4, without calibration data" in report.rounding
    assert verify(tmp_path / "out").problems == []
    assert quantization(tmp_path / "out")["value_dtype"] == "int4"
    assert quantization(tmp_path / "out")["format_version"] == 2
    before, after = CheckpointReader(place / "sparse"), CheckpointReader(tmp_path / "out")
    assert before.sparse_layers() == after.sparse_layers()
    errors = {
        one.name: one.rounding_error for one in report.linears if one.rounding_error is not None
    }
    assert errors.keys() == set(after.sparse_layers())
    for name, error in errors.items():
        values, found = before.layer(name).values.float(), after.layer(name)
        assert len(found.values.unique()) > 16
        rest = values - found.values * found.scale[:, None]
        assert float(rest.norm() / values.norm()) == pytest.approx(error, rel=1e-4)
        assert 0.02 < error < 0.15


@pytest.mark.parametrize(
    ("stored", "values", "reason"),
    [
        ("int4", "int4", "nothing to do"),
        ("int4", "int8", "int8 would be the same in more bytes"),
        ("int8", "int4", "int4 would round them once more"),
    ],
)
def test_integers_are_not_rounded_again(
    dense: Path, tmp_path: Path, stored: Values, values: Values, reason: str
) -> None:
    source = prune(dense, tmp_path / "source")
    convert_to_sparse(str(source), tmp_path / "integers", values=stored)
    with pytest.raises(OfflineError, match=f"are {stored}: {reason}. Serve it"):
        convert_to_sparse(str(tmp_path / "integers"), tmp_path / "out", values=values)


def test_reports_say_what_was_done(place: Path, report: ConversionReport) -> None:
    written = json.loads((place / "int8" / "conversion.json").read_text())
    assert written == report.to_dict()
    assert report.source_format == "permllm, float32 values"
    assert "without calibration data" in report.rounding
    assert all(0 < linear.rounding_error < 0.01 for linear in report.linears)
    assert {linear.density for linear in report.linears} == {0.5}


@pytest.mark.parametrize("kind", ["2:4", "bitmask", "4:8"])
def test_other_sources_take_one_step(dense: Path, tmp_path: Path, kind: str) -> None:
    source = prune(dense, tmp_path / "source", *((4, 8) if kind == "4:8" else (2, 4)))
    if kind == "bitmask":
        source = write_bitmask(source, tmp_path / "bitmask")
    convert_to_sparse(str(source), tmp_path / "sparse")
    convert_to_sparse(str(tmp_path / "sparse"), tmp_path / "two-steps", values="int8")
    report = convert_to_sparse(str(source), tmp_path / "one-step", strict=True, values="int8")
    assert verify(tmp_path / "one-step").problems == []
    assert same_weights(tmp_path / "one-step", tmp_path / "two-steps")
    assert quantization(tmp_path / "one-step") == quantization(tmp_path / "two-steps")
    assert quantization(tmp_path / "one-step")["value_dtype"] == "int8"
    assert report.to_dict() == json.loads((tmp_path / "one-step" / "conversion.json").read_text())
    again = json.loads((tmp_path / "two-steps" / "conversion.json").read_text())
    assert {one.name: one.rounding_error for one in report.linears} == {
        one["name"]: one["rounding_error"] for one in again["linears"]
    }


def test_the_model_is_the_same_but_for_rounding(
    place: Path, report: ConversionReport, tmp_path: Path
) -> None:
    """Norms keep what is relative, so the errors of linears at most add up, to first order."""
    exact, rounded = logits(place / "sparse"), logits(place / "int8")
    most = sum(linear.rounding_error for linear in report.linears)
    assert most < 0.12
    assert 1e-3 * exact.norm() < (rounded - exact).norm() < most * exact.norm()
    convert_to_dense(str(place / "int8"), tmp_path / "back")
    assert (logits(tmp_path / "back") - rounded).abs().max() < 1e-4 * rounded.abs().max()


def test_the_way_back_has_the_channels_of_the_source(
    place: Path, report: ConversionReport, tmp_path: Path
) -> None:
    """Rows keep their scales where folds have moved them: each weight is off by half a step."""
    convert_to_dense(str(place / "int8"), tmp_path / "back")
    before, after = load_all(place / "plain"), load_all(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, weight in before.items():
        if parts(name)[0].endswith("_proj") and name.endswith("weight"):
            step = weight.abs().amax(1, keepdim=True) / 127
            assert ((after[name] - weight).norm(dim=1) < 0.02 * weight.norm(dim=1)).all()
            assert ((after[name] - weight).abs() <= step * 0.51).float().mean() > 0.99
            assert not after[name][weight == 0].any()
        else:
            assert torch.equal(after[name], weight)


def test_experts_and_fused_dense_ones(tmp_path: Path) -> None:
    """Layer 0 keeps its experts dense and fused, as some models store them."""
    source = save_mixture(tmp_path / "source", one_dense_expert)
    sparse = tmp_path / "sparse"
    convert_to_sparse(str(source), sparse)
    tensors = load_file(sparse / "model.safetensors")
    experts = "model.layers.0.mlp.experts"

    def stacked(linear: str) -> Tensor:
        names = [f"{experts}.{expert}.{linear}.weight" for expert in range(4)]
        return torch.stack([tensors.pop(name) for name in names])

    gate, up, down = map(stacked, ("gate_proj", "up_proj", "down_proj"))
    tensors[f"{experts}.gate_up_proj"] = torch.cat([gate, up], dim=1)
    tensors[f"{experts}.down_proj"] = down
    save_file(tensors, sparse / "model.safetensors", metadata={"format": "pt"})
    (sparse / "SHA256SUMS").unlink()
    convert_to_sparse(str(sparse), tmp_path / "int8", values="int8")
    assert verify(tmp_path / "int8").problems == []
    after = load_all(tmp_path / "int8")
    check_the_rest(tensors, after)
    assert after["model.layers.1.mlp.experts.3.up_proj.weight_packed"].dtype == torch.int8


@pytest.mark.parametrize("options", [{"pattern": Pattern(2, 4)}, {"strict": True}])
def test_options_of_other_sources_are_refused(
    place: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    with pytest.raises(OfflineError, match="are about what is found in a source: leave them out"):
        convert_to_sparse(str(place / "sparse"), tmp_path / "out", values="int8", **options)


def test_a_source_without_sparse_layers_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(OfflineError, match=r"no linear .* obeys 2:4"):
        convert_to_sparse(str(dense), tmp_path / "out", values="int8")
    source = shutil.copytree(dense, tmp_path / "source")
    entries = {"quant_method": "permllm", "format_version": 1, "pattern": "2:4", "block_size": 64}
    entries |= {"value_dtype": "bfloat16", "ignore": [], "runtime_permuted": [], "folded": []}
    set_config(source, quantization_config=entries | {"tool_version": "0.1.0"})
    with pytest.raises(OfflineError, match=r"config\.json of a sparse model, but no sparse layer"):
        convert_to_sparse(str(source), tmp_path / "out", values="int8")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (f"{DOWN}.weight_mask", lambda bits: bits.fill_(1), "weight_mask: found 1 bits in row 0"),
        (f"{O}.weight_packed", lambda v: v.fill_(float("nan")), "weight_packed: found inf or nan"),
        (f"{O}.weight_packed", lambda v: v.fill_(3e38), "o_proj has a row of values that are too"),
    ],
)
def test_what_cannot_be_rounded_is_refused(
    place: Path, tmp_path: Path, name: str, change: object, message: str
) -> None:
    source = shutil.copytree(place / "sparse", tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    change(tensors[f"model.layers.1.{name}"])
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((CheckpointError, OfflineError), match=rf"layers\.1\..*{message}"):
        convert_to_sparse(str(source), tmp_path / "out", values="int8")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
