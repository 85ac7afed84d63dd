"""Weights of 8 bits and their scales, read as dense tensors."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint import scaled_tensors
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_headers import dense_headers
from permllm_vllm.checkpoint.scaled_tensors import ScaledTensors, open_parts
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.tensors import StoredTensors
from tests.checkpoint.plain_scaled import restored
from tests.checkpoint.scaled_files import (
    EXPERTS,
    FORM,
    UP,
    headers_of,
    open_with,
    pair,
    random,
)


def test_the_checkpoint_is_a_dense_one(tmp_path: Path) -> None:
    up, up_scale, up_dense = pair(10, 8)
    norm = torch.ones(8).bfloat16()
    tensors = {
        f"{UP}.weight": up,
        f"{UP}.weight_scale_inv": up_scale,
        f"{UP}.activation_scale": torch.tensor(2.0),
        f"{UP}.input_scale": torch.tensor(2.0),
        "model.norm.weight": norm,
        "logit_scale": torch.tensor(3.0),
        "lm_head.weight": up,
        "lm_head.weight_scale_inv": up_scale,
    }
    found = open_with(tensors, tmp_path)
    names = ["lm_head.weight", "logit_scale", f"{UP}.weight", "model.norm.weight"]
    assert found.names() == names
    assert found.header(f"{UP}.weight") == ((10, 8), "bfloat16")
    assert torch.equal(found.tensor(f"{UP}.weight"), up_dense)
    assert torch.equal(found.tensor("model.norm.weight"), norm)
    assert found.tensor("logit_scale") == 3
    assert f"{UP}.weight_scale_inv" not in found
    dense = dense_headers(headers_of(tensors), FORM, "bfloat16")
    assert dense == {name: found.header(name) for name in found.names()}


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (Block(1, None), [1.0, 2.0, 3.0, 4.0]),
        (Block(3, None), [1.0, 1.0, 1.0, 2.0]),
        (Block(None, None), [1.0, 1.0, 1.0, 1.0]),
        (Block(1, 2), None),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_scales_of_the_rows_of_integers(
    block: Block, expected: list[float] | None, dtype: torch.dtype, tmp_path: Path
) -> None:
    grid = block.grid(4, 6)
    scale = torch.arange(1.0, 1 + grid[0] * grid[1]).view(grid).half()
    tensors = {
        f"{UP}.weight": torch.ones(4, 6).to(dtype),
        f"{UP}.weight_scale": scale,
        "model.norm.weight": torch.ones(6),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    form = ScaledForm(str(dtype).removeprefix("torch."), block)
    found = ScaledTensors(StoredFiles(tmp_path), form, torch.bfloat16)
    rows = found.row_scales(f"{UP}.weight")
    if expected is None or dtype != torch.int8:
        assert rows is None
    else:
        assert rows is not None
        assert rows.dtype == torch.float32
        assert rows.tolist() == expected
    assert found.row_scales("model.norm.weight") is None
    assert found.row_scales("none.weight") is None


def test_integers_of_several_experts_have_no_rows_of_one_matrix(tmp_path: Path) -> None:
    name = f"{EXPERTS}.down_proj"
    tensors = {name: torch.ones(2, 4, 6).to(torch.int8), f"{name}_scale": torch.ones(2, 4, 1)}
    save_file(tensors, tmp_path / "model.safetensors")
    form = ScaledForm("int8", Block(1, None))
    found = ScaledTensors(StoredFiles(tmp_path), form, torch.bfloat16)
    assert found.row_scales(name) is None


def test_what_is_not_listed_is_not_read(tmp_path: Path) -> None:
    gate_up, scale, _ = fused(2, 8, 6)
    name = f"{EXPERTS}.gate_up_proj"
    tensors = {name: gate_up, f"{name}_scale_inv": scale}
    parts = open_parts(open_with(tensors, tmp_path).directory, FORM, torch.bfloat16)
    separate = StoredTensors(parts, experts_under="model.layers.")
    assert name not in separate
    for read in (separate.header, separate.tensor, parts.header):
        for hidden in (f"{name}_scale_inv", "nothing"):
            with pytest.raises(CheckpointError, match="only stored tensors can be read; remedy"):
                read(hidden)
    for read in (separate.header, separate.tensor):
        with pytest.raises(CheckpointError, match="only stored tensors can be read; remedy"):
            read(name)
    with pytest.raises(CheckpointError, match="only stored tensors can be read; remedy"):
        parts.part(f"{name}_scale_inv", 0, (1,))


@pytest.mark.parametrize("elements", [1, 8, 24, 1 << 20])
def test_it_is_read_in_parts_that_give_the_same(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_tensors, "_CHUNK_ELEMENTS", elements)
    read: list[int] = []
    part = Shard.part

    def counted(self: Shard, name: str, start: int, shape: tuple[int, ...]) -> Tensor:
        found = part(self, name, start, shape)
        if found.dtype == torch.float8_e4m3fn:
            read.append(found.numel())
        return found

    monkeypatch.setattr(Shard, "part", counted)
    stored, scale, dense = pair(10, 8)
    found = open_with({f"{UP}.weight": stored, f"{UP}.weight_scale": scale}, tmp_path)
    assert torch.equal(found.tensor(f"{UP}.weight"), dense)
    assert sum(read) == 80
    assert max(read) <= max(elements, 8)


@pytest.mark.parametrize(
    ("block", "shape"),
    [
        (Block(None, None), ()),
        (Block(None, None), (1,)),
        (Block(None, None), (1, 1)),
        (Block(1, None), (10, 1)),
        (Block(1, None), (10,)),
        (Block(1, 3), (10, 3)),
        (Block(4, 3), (3, 3)),
        (Block(128, 128), (1, 1)),
    ],
)
@pytest.mark.parametrize("stored", ["float8_e4m3fn", "int8"])
def test_shapes_of_scales(
    block: Block, shape: tuple[int, ...], stored: str, tmp_path: Path
) -> None:
    form = ScaledForm(stored, block)
    weight, scale, dense = pair(10, 8, form=form)
    tensors = {f"{UP}.weight": weight, f"{UP}.weight_scale": scale.reshape(shape)}
    assert torch.equal(open_with(tensors, tmp_path, form=form).tensor(f"{UP}.weight"), dense)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_products_of_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    stored, scale, _ = pair(8, 6)
    found = open_with({f"{UP}.weight": stored, f"{UP}.weight_scale": scale}, tmp_path, dtype=dtype)
    whole = stored.float() * scale.repeat_interleave(4, 0).repeat_interleave(3, 1)
    assert found.header(f"{UP}.weight").dtype == str(dtype).removeprefix("torch.")
    assert torch.equal(found.tensor(f"{UP}.weight"), whole.to(dtype))


def fused(experts: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices of all experts, scales and products, each one after the other."""
    parts = [pair(rows, columns + number)[:2] for number in range(experts)]
    stored = torch.stack([one[:, :columns].view(torch.uint8) for one, _ in parts])
    scales = torch.stack([scale[:, : -(-columns // 3)] for _, scale in parts])
    stored = stored.view(torch.float8_e4m3fn)
    dense = [restored(one, scale.tolist(), 4, 3) for one, scale in zip(stored, scales, strict=True)]
    return stored, scales, torch.stack(dense)


@pytest.mark.parametrize("elements", [7, 1 << 20])
def test_experts_in_one_tensor(
    elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_tensors, "_CHUNK_ELEMENTS", elements)
    gate_up, gate_up_scale, dense = fused(3, 16, 7)
    down, down_scale, dense_down = fused(3, 7, 8)
    tensors = {
        f"{EXPERTS}.gate_up_proj": gate_up,
        f"{EXPERTS}.gate_up_proj_scale_inv": gate_up_scale,
        f"{EXPERTS}.gate_up_proj_activation_scale": torch.ones(3),
        f"{EXPERTS}.down_proj": down,
        f"{EXPERTS}.down_proj_scale_inv": down_scale,
    }
    whole = open_with(tensors, tmp_path)
    assert whole.names() == [f"{EXPERTS}.down_proj", f"{EXPERTS}.gate_up_proj"]
    assert torch.equal(whole.tensor(f"{EXPERTS}.gate_up_proj"), dense)
    separate = open_with(tensors, tmp_path, experts_under="model.layers.")
    assert len(separate.names()) == 9
    for expert in range(3):
        expected = (dense[expert, :8], dense[expert, 8:], dense_down[expert])
        for kind, matrix in zip(("gate_proj", "up_proj", "down_proj"), expected, strict=True):
            name = f"{EXPERTS}.{expert}.{kind}.weight"
            assert separate.header(name) == (tuple(matrix.shape), "bfloat16")
            assert torch.equal(separate.tensor(name), matrix)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 1, 1), (3, 2), (3, 2, 1)])
@pytest.mark.parametrize("elements", [7, 1 << 20])
def test_scales_of_whole_experts(
    shape: tuple[int, ...], elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each expert, or as Transformers has them one for gate and one for up."""
    monkeypatch.setattr(scaled_tensors, "_CHUNK_ELEMENTS", elements)
    form, name = ScaledForm("float8_e4m3fn", Block(None, None)), f"{EXPERTS}.gate_up_proj"
    stored = torch.stack([pair(10, 7 + n)[0][:, :7].view(torch.uint8) for n in range(3)])
    stored, scale = stored.view(torch.float8_e4m3fn), random(*shape)
    tensors = {name: stored, f"{name}_scale_inv": scale}
    halves = scale.reshape(3, -1).expand(3, 2).tolist()
    expected = [
        torch.cat([restored(half, [[one]], 5, 7) for half, one in zip(both, factors, strict=True)])
        for both, factors in zip(stored.unflatten(1, (2, 5)), halves, strict=True)
    ]
    assert torch.equal(open_with(tensors, tmp_path, form).tensor(name), torch.stack(expected))
    separate = open_with(tensors, tmp_path, form, experts_under="model.layers.")
    for expert, whole in enumerate(expected):
        for kind, half in (("gate_proj", whole[:5]), ("up_proj", whole[5:])):
            assert torch.equal(separate.tensor(f"{EXPERTS}.{expert}.{kind}.weight"), half)


def bad(which: str) -> dict[str, Tensor]:
    stored, scale, _ = pair(10, 8)
    if which == "nan":
        stored.view(torch.uint8)[7, 3] = 0xFF
    elif which == "scale":
        scale[1, 1] = float("inf")
    elif which == "product":
        scale[2, 0] = 1e6
    else:
        scale[2, 0] = 3e38
    return {f"{UP}.weight": stored, f"{UP}.weight_scale_inv": scale}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "nan",
            "up_proj.weight: found nan in row 7; rule: every weight is a number; remedy: fetch",
        ),
        ("scale", "weight_scale_inv: found nan or infinity; rule: every scale is a finite number"),
        (
            "product",
            "beyond the range of float16 in row 8; rule: .*: read it as bfloat16 or float32",
        ),
    ],
)
@pytest.mark.parametrize("elements", [16, 1 << 20])
def test_what_is_no_number_is_refused(
    which: str, message: str, elements: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled_tensors, "_CHUNK_ELEMENTS", elements)
    found = open_with(bad(which), tmp_path, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=message):
        found.tensor(f"{UP}.weight")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_other_dtype_is_of_use_where_a_scale_is_damaged(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    found = open_with(bad("range"), tmp_path, dtype=dtype)
    with pytest.raises(CheckpointError, match=r"beyond the range of .*remedy: fetch .* again$"):
        found.tensor(f"{UP}.weight")


def test_a_weight_and_its_scale_may_lie_in_two_files(tmp_path: Path) -> None:
    stored, scale, dense = pair(10, 8)
    weight_map = {}
    for number, (name, tensor) in enumerate(
        ((f"{UP}.weight", stored), (f"{UP}.weight_scale", scale))
    ):
        file = f"model-{number}.safetensors"
        save_file({name: tensor}, tmp_path / file, metadata={"format": "pt"})
        weight_map[name] = file
    (tmp_path / "model.safetensors.index.json").write_text(
        str({"weight_map": weight_map}).replace("'", '"')
    )
    found = StoredTensors(open_parts(tmp_path, FORM, torch.bfloat16))
    assert torch.equal(found.tensor(f"{UP}.weight"), dense)
