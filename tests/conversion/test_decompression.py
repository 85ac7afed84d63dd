"""Models in 8 and 4 bits become dense as compressed-tensors restores them, weight for weight."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import DOWN, LINEARS, load_all, prune, set_config

pytest.importorskip("compressed_tensors.entrypoints.convert", reason="comes with vLLM")

Stored = tuple[dict[str, Tensor], Tensor]
"""The tensors of a matrix by their kinds, and what they stand for in float32."""


def of_channels(weight: Tensor, dtype: torch.dtype, largest: float) -> Stored:
    scale = weight.abs().amax(1, keepdim=True) / largest
    steps = weight / scale
    stored = (steps if dtype.is_floating_point else steps.round()).to(dtype)
    return {"weight": stored, "weight_scale": scale}, stored.float() * scale


def float8(weight: Tensor) -> Stored:
    return of_channels(weight, torch.float8_e4m3fn, 448)


def int8(weight: Tensor) -> Stored:
    return of_channels(weight, torch.int8, 127)


def int4(weight: Tensor) -> Stored:
    """Groups of 32 channels, eight integers in an int32, the first in the lowest bits."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(2) / 7
    integers = (groups / scale[..., None]).round()
    bits = (integers + 8).long().flatten(1).unflatten(1, (-1, 8)) << 4 * torch.arange(8)
    packed = bits.sum(2)
    packed = torch.where(packed >= 2**31, packed - 2**32, packed).int()
    shape = torch.tensor(weight.shape)
    stored = {"weight_packed": packed, "weight_shape": shape, "weight_scale": scale}
    return stored, (integers * scale[..., None]).flatten(1)


def fp8_blocks(weight: Tensor) -> Stored:
    """One scale for 32 rows and 64 channels."""
    blocks = weight.unflatten(1, (-1, 64)).unflatten(0, (-1, 32))
    scale = blocks.abs().amax((1, 3)) / 448
    stored = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
    whole = (stored.float() * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return {"weight": stored.flatten(2).flatten(0, 1), "weight_scale_inv": scale}, whole


def groups_of(layout: str, **weights: object) -> dict[str, Any]:
    activations = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    if layout == "int-quantized":
        group["input_activations"] = activations
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


FORMS: dict[str, tuple[Callable[[Tensor], Stored], dict[str, Any]]] = {
    "float8": (float8, groups_of("float-quantized", num_bits=8, type="float", strategy="channel")),
    "int8": (int8, groups_of("int-quantized", num_bits=8, type="int", strategy="channel")),
    "int4": (
        int4,
        groups_of("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32),
    ),
    "fp8": (fp8_blocks, {"quant_method": "fp8", "weight_block_size": [32, 64]}),
}


def quantize(dense: Path, target: Path, form: str) -> tuple[Path, dict[str, Tensor]]:
    """Store the linears of a model in a form; what its tensors stand for."""
    store, entries = FORMS[form]
    source = shutil.copytree(dense, target)
    expected, stored = load_file(source / "model.safetensors"), {}
    for name, tensor in expected.items():
        module = name.removesuffix(".weight")
        if not module.endswith(LINEARS):
            stored[name] = tensor
            continue
        parts, whole = store(tensor.float())
        stored |= {f"{module}.{kind}": one.contiguous() for kind, one in parts.items()}
        stored[f"{module}.input_scale"] = torch.ones(1)
        expected[name] = whole.to(tensor.dtype)
    stored["model.layers.0.self_attn.k_scale"] = torch.ones(1)
    save_file(stored, source / "model.safetensors", metadata={"format": "pt"})
    set_config(source, quantization_config=entries)
    return source, expected


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_its_product_with_its_scale(form: str, dense: Path, tmp_path: Path) -> None:
    source, expected = quantize(dense, tmp_path / "quantized", form)
    report = convert_to_dense(str(source), tmp_path / "dense")
    assert report.source_format == FORMS[form][1]["quant_method"]
    found = load_all(tmp_path / "dense")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name], tensor, rtol=2**-7, atol=0)
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())


@pytest.mark.parametrize("form", FORMS)
def test_zeros_stay_and_the_dense_model_becomes_sparse(
    form: str, dense: Path, tmp_path: Path
) -> None:
    source, _ = quantize(prune(dense, tmp_path / "pruned"), tmp_path / "quantized", form)
    with pytest.raises(OfflineError, match="`permllm-offline convert --to dense`"):
        convert_to_sparse(str(source), tmp_path / "out")
    convert_to_dense(str(source), tmp_path / "dense")
    convert_to_sparse(str(tmp_path / "dense"), tmp_path / "out", strict=True)
    assert validate(tmp_path / "out") == []


def damage(source: Path, kind: str, change: Callable[[Tensor], Tensor] | None) -> None:
    tensors = load_file(source / "model.safetensors")
    name = f"model.layers.0.{DOWN}.{kind}"
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("form", "kind", "change", "message"),
    [
        ("float8", "weight_scale", None, "float8_e4m3fn that nothing says how to restore"),
        ("float8", "weight_scale", lambda t: t[:-1].clone(), r"cannot restore .*down_proj"),
        ("float8", "weight_scale", lambda t: t / 0, "found inf or nan"),
        ("int4", "weight_packed", None, r"down_proj\.weight: found only .*covers every quantized"),
        ("fp8", "weight_scale_inv", None, "float8_e4m3fn that nothing says how to restore"),
    ],
)
def test_damaged_weights_are_refused(
    form: str,
    kind: str,
    change: Callable[[Tensor], Tensor] | None,
    message: str,
    dense: Path,
    tmp_path: Path,
) -> None:
    source, _ = quantize(dense, tmp_path / "quantized", form)
    damage(source, kind, change)
    with pytest.raises((CheckpointError, OfflineError), match=message):
        convert_to_dense(str(source), tmp_path / "dense")
    assert not (tmp_path / "dense").exists()


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quant_method": "gptq"}, "found gptq; .*from before its quantization"),
        ({"quant_method": "fp8"}, "FP8 with weight_block_size None: .*dequantize=True"),
        (groups_of("marlin-24", num_bits=4), "found compressed-tensors in marlin-24"),
        (groups_of("int-quantized", num_bits="x"), "is not one that compressed-tensors reads"),
    ],
)
def test_other_forms_are_refused(
    entries: dict[str, Any], message: str, dense: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(dense, tmp_path / "source")
    set_config(source, quantization_config=entries)
    with pytest.raises(OfflineError, match=message):
        convert_to_dense(str(source), tmp_path / "dense")


def test_without_the_package_it_is_named(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _ = quantize(dense, tmp_path / "quantized", "int8")
    monkeypatch.setitem(sys.modules, "compressed_tensors.entrypoints.convert", None)
    with pytest.raises(OfflineError, match="`pip install compressed-tensors`"):
        convert_to_dense(str(source), tmp_path / "dense")
