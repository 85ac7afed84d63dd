"""Weights of 8 bits and their scales, read as dense tensors."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint import scaled_tensors
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_headers import dense_headers
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.tensors import StoredTensors
from tests.checkpoint.plain_scaled import quantized, restored

FORM = ScaledForm("float8_e4m3fn", Block(4, 3))
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def pair(*shape: int, form: ScaledForm = FORM) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix as it is stored, its scales, and what both stand for."""
    rows, columns = form.block.rows or shape[0], form.block.columns or shape[1]
    stored, scale = quantized(random(*shape), rows, columns, getattr(torch, form.stored))
    scales = torch.tensor(scale)
    return stored, scales, restored(stored, scales.tolist(), rows, columns)


def open_with(tensors: Mapping[str, Tensor], directory: Path, **said: object) -> StoredTensors:
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(owned, directory / "model.safetensors", metadata={"format": "pt"})
    return StoredTensors(directory, **({"form": FORM} | said))  # type: ignore[arg-type]


def test_the_checkpoint_is_a_dense_one(tmp_path: Path) -> None:
    up, up_scale, up_dense = pair(10, 8)
    norm = torch.ones(8).bfloat16()
    tensors = {
        f"{UP}.weight": up,
        f"{UP}.weight_scale_inv": up_scale,
        f"{UP}.activation_scale": torch.tensor(2.0),
        f"{UP}.input_scale": torch.tensor(2.0),
        "model.layers.0.self_attn.k_scale": torch.tensor(2.0),
        "model.layers.0.self_attn.v_proj.output_scale": torch.tensor(2.0),
        "model.norm.weight": norm,
        "logit_scale": torch.tensor(3.0),
    }
    found = open_with(tensors, tmp_path)
    assert found.names() == ["logit_scale", f"{UP}.weight", "model.norm.weight"]
    assert found.header(f"{UP}.weight") == ((10, 8), "bfloat16")
    assert torch.equal(found.tensor(f"{UP}.weight"), up_dense)
    assert torch.equal(found.tensor("model.norm.weight"), norm)
    assert found.tensor("logit_scale") == 3
    assert f"{UP}.weight_scale_inv" not in found
    headers = {n: TensorHeader(tuple(t.shape), str(t.dtype)[6:]) for n, t in tensors.items()}
    dense = dense_headers(headers, FORM, "bfloat16")
    assert dense == {name: found.header(name) for name in found.names()}


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
    """Rows of up begin inside a block of gate's."""
    monkeypatch.setattr(scaled_tensors, "_CHUNK_ELEMENTS", elements)
    gate_up, gate_up_scale, dense = fused(3, 10, 7)
    down, down_scale, dense_down = fused(3, 7, 5)
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
        expected = (dense[expert, :5], dense[expert, 5:], dense_down[expert])
        for kind, matrix in zip(("gate_proj", "up_proj", "down_proj"), expected, strict=True):
            name = f"{EXPERTS}.{expert}.{kind}.weight"
            assert separate.header(name) == (tuple(matrix.shape), "bfloat16")
            assert torch.equal(separate.tensor(name), matrix)


FLOAT8 = torch.ones(10, 8).to(torch.float8_e4m3fn)
GRID = torch.ones(3, 3)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{UP}.weight": FLOAT8}, "up_proj.weight: found float8_e4m3fn without a scale; rule: we"),
        ({f"{EXPERTS}.down_proj": FLOAT8.view(2, 5, 8)}, "experts.down_proj: found float8_e4m3fn"),
        ({f"{UP}.weight_scale": GRID}, "up_proj.weight: found nothing; rule: weight_scale belongs"),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.weight_scale_inv": GRID},
            "weight_scale: found also .*weight_scale_inv; rule: a weight has one scale",
        ),
        (
            {f"{UP}.weight": FLOAT8.bfloat16(), f"{UP}.weight_scale": GRID},
            "up_proj.weight: found bfloat16; rule: float8_e4m3fn, by config.json",
        ),
        (
            {f"{UP}.weight": FLOAT8.float().to(torch.float8_e5m2), f"{UP}.weight_scale": GRID},
            "up_proj.weight: found float8_e5m2",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID.to(torch.uint8)},
            "weight_scale: found uint8; rule: one of float32, bfloat16, float16",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": torch.ones(3, 2)},
            r"found shape \[3, 2\]; rule: \[3, 3\] for a weight of \[10, 8\] in blocks of 4 x 3",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": torch.tensor(1.0)},
            r"weight_scale: found shape \[\]; rule: \[3, 3\]",
        ),
        (
            {f"{UP}.weight": FLOAT8[0].clone(), f"{UP}.weight_scale": torch.ones(3)},
            r"up_proj.weight: found shape \[8\]; rule: a matrix",
        ),
        (
            {f"{UP}.weight": FLOAT8, f"{UP}.weight_scale": GRID, f"{UP}.weight_zero_point": GRID},
            "weight_zero_point: found an unknown tensor",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused_at_once(
    tensors: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_with({"model.norm.weight": torch.ones(2)} | tensors, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8])
def test_without_a_form_they_are_no_dense_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    """As of tools that say of their quantization in a file of their own."""
    found = open_with({f"{UP}.weight": torch.ones(2, 2).to(dtype)}, tmp_path, form=None)
    for read in (found.header, found.tensor):
        with pytest.raises(
            CheckpointError, match=r"without a scale; rule: .* a quantization_config"
        ):
            read(f"{UP}.weight")


def bad(which: str) -> dict[str, Tensor]:
    stored, scale, _ = pair(10, 8)
    if which == "nan":
        stored.view(torch.uint8)[7, 3] = 0xFF
    elif which == "scale":
        scale[1, 1] = float("inf")
    else:
        scale[2, 0] = 1e6
    return {f"{UP}.weight": stored, f"{UP}.weight_scale_inv": scale}


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (
            "nan",
            "up_proj.weight: found nan in row 7; rule: every weight is a number; remedy: fetch",
        ),
        ("scale", "weight_scale_inv: found nan or infinity; rule: every scale is a finite number"),
        ("product", "beyond the range of float16 in row 8; rule: .*--dtype bfloat16 or float32"),
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
    found = StoredTensors(tmp_path, form=FORM)
    assert torch.equal(found.tensor(f"{UP}.weight"), dense)
