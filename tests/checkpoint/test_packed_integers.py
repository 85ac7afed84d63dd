"""Integers that lie in int32 are read as weights of int8."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.packed_integers import (
    PackedFiles,
    unpack_integers,
    unpacked_headers,
)
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_headers import dense_headers
from permllm_vllm.checkpoint.scaled_tensors import open_parts
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.tensors import StoredTensors
from tests.checkpoint.plain_scaled import packed, restored
from tests.checkpoint.scaled_files import UP, headers_of

FORM = ScaledForm("int8", Block(1, 16), 4)


def integers(bits: int, rows: int = 6, columns: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(bits)
    end = 2 ** (bits - 1)
    found = torch.randint(-end, end, (rows, columns), generator=generator)
    found[0, :2] = torch.tensor([-end, end - 1])
    return found.to(torch.int8)


def stored(bits: int = 4) -> dict[str, Tensor]:
    weight = integers(bits)
    return {
        f"{UP}.weight_packed": packed(weight, bits),
        f"{UP}.weight_shape": torch.tensor(weight.shape),
        f"{UP}.weight_scale": torch.arange(1.0, 13.0).view(6, 2).bfloat16(),
        "model.norm.weight": torch.ones(32),
    }


def written(tensors: Mapping[str, Tensor], directory: Path) -> StoredFiles:
    save_file(dict(tensors), directory / "model.safetensors", metadata={"format": "pt"})
    return StoredFiles(directory)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_come_back(bits: int, tmp_path: Path) -> None:
    weight = integers(bits)
    assert torch.equal(unpack_integers(packed(weight, bits), bits), weight)
    files = PackedFiles(written(stored(bits), tmp_path), bits)
    assert set(files.names()) == {f"{UP}.weight", f"{UP}.weight_scale", "model.norm.weight"}
    assert files.header(f"{UP}.weight") == ((6, 32), "int8")
    assert torch.equal(files.part(f"{UP}.weight", 0, (6, 32)), weight)
    assert torch.equal(files.part(f"{UP}.weight", 64, (3, 32)), weight[2:5])
    assert torch.equal(files.part("model.norm.weight", 3, (2,)), torch.ones(2))


def test_the_checkpoint_is_a_dense_one(tmp_path: Path) -> None:
    tensors = stored()
    written(tensors, tmp_path)
    found = StoredTensors(open_parts(tmp_path, FORM, torch.bfloat16))
    assert found.names() == [f"{UP}.weight", "model.norm.weight"]
    scale = tensors[f"{UP}.weight_scale"].float().tolist()
    assert torch.equal(found.tensor(f"{UP}.weight"), restored(integers(4), scale, 1, 16))
    dense = dense_headers(headers_of(tensors), FORM, "bfloat16")
    assert dense == {name: found.header(name) for name in found.names()}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("weight_packed", lambda t: t.long(), "weight_packed: found int64 of shape"),
        ("weight_packed", lambda t: t.flatten(), r"found int32 of shape \[24\]; rule: int32, a ma"),
        ("weight_packed", lambda t: t[:, :-1].clone(), r"weight_shape: found \[6, 32\]; rule: \[6"),
        ("weight_shape", lambda t: t - 1, r"weight_shape: found \[5, 31\]; rule: \[6, 32\], what"),
        ("weight_shape", lambda t: t.double(), "weight_shape: found float64"),
        ("weight_scale", lambda t: t[:, :1].clone(), r"weight_scale: found shape \[6, 1\]"),
        ("weight", lambda t: torch.ones(6, 32), "weight: found a second, dense weight"),
        ("weight_g_idx", lambda t: torch.zeros(32), "weight_g_idx: found an unknown tensor"),
        ("weight_zero_point", lambda t: torch.zeros(6), "weight_zero_point: found an unknown"),
    ],
)  # fmt: skip
def test_what_is_no_such_weight_is_refused(
    kind: str, change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    tensors = stored()
    name = f"{UP}.{kind}"
    tensors[name] = change(tensors.get(name, torch.empty(0)))
    written(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=message):
        open_parts(tmp_path, FORM, torch.bfloat16)


def test_headers_that_are_no_packed_ones_stay() -> None:
    headers = {
        "a.weight": TensorHeader((2, 3), "bfloat16"),
        "b.weight_shape": TensorHeader((2,), "int64"),
    }
    assert unpacked_headers(headers, 4) == headers
