"""Experts of a layer in one tensor: which matrix lies where."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.fused_experts import is_fused, parts_of, separate
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.tensors import StoredTensors

UNDER = "model.layers."
EXPERTS = f"{UNDER}0.mlp.experts"
OTHER = "mtp.layers.0.mlp.experts.gate_up_proj"


@pytest.fixture
def stored(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Two experts of 3 inner and 4 hidden channels, and those of something else."""
    tensors = {
        f"{EXPERTS}.gate_up_proj": torch.arange(48.0).view(2, 6, 4).bfloat16(),
        f"{EXPERTS}.down_proj": torch.arange(24.0).view(2, 4, 3),
        f"{UNDER}0.norm.weight": torch.ones(4),
        OTHER: torch.zeros(2, 6, 4),
        "scalar": torch.tensor(3.0),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    return tensors


def test_every_matrix_is_a_slice(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    found = StoredTensors(StoredFiles(tmp_path), experts_under=UNDER)
    gate_up, down = stored[f"{EXPERTS}.gate_up_proj"], stored[f"{EXPERTS}.down_proj"]
    expected = {name: stored[name] for name in (f"{UNDER}0.norm.weight", OTHER, "scalar")}
    for expert in range(2):
        expected[f"{EXPERTS}.{expert}.gate_proj.weight"] = gate_up[expert, :3]
        expected[f"{EXPERTS}.{expert}.up_proj.weight"] = gate_up[expert, 3:]
        expected[f"{EXPERTS}.{expert}.down_proj.weight"] = down[expert]
    assert set(found.names()) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(found.tensor(name), tensor)
        assert found.tensor(name).dtype == tensor.dtype
        assert found.header(name).shape == tuple(tensor.shape)
        assert name in found
    assert f"{EXPERTS}.down_proj" not in found


def test_they_stay_as_they_are_unasked(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    found = StoredTensors(StoredFiles(tmp_path))
    assert set(found.names()) == set(stored)
    assert all(torch.equal(found.tensor(name), tensor) for name, tensor in stored.items())


def test_headers_say_the_same(tmp_path: Path, stored: dict[str, torch.Tensor]) -> None:
    headers = {n: TensorHeader(tuple(t.shape), str(t.dtype)[6:]) for n, t in stored.items()}
    found = StoredTensors(StoredFiles(tmp_path), experts_under=UNDER)
    assert separate(headers, UNDER) == {name: found.header(name) for name in found.names()}


@pytest.mark.parametrize("shape", [(4, 6), (2, 5, 4), (2, 2, 6, 4)])
def test_other_shapes_have_no_parts(shape: tuple[int, ...]) -> None:
    assert not dict(parts_of(f"{EXPERTS}.gate_up_proj", shape))


@pytest.mark.parametrize(
    ("granite", "other"),
    [("input_linear.weight", "gate_up_proj"), ("output_linear.weight", "down_proj")],
)
def test_granite_has_other_names_for_the_same(granite: str, other: str) -> None:
    moe, shape = f"{UNDER}0.block_sparse_moe", (2, 6, 4)
    stored = f"{moe}.{granite}"
    expected = {
        name: part._replace(tensor=stored)
        for name, part in parts_of(f"{moe}.experts.{other}", shape)
    }
    assert dict(parts_of(stored, shape)) == expected
    assert all(name.startswith(f"{moe}.experts.") for name in expected)


def test_names() -> None:
    assert is_fused(f"{EXPERTS}.gate_up_proj")
    assert is_fused(f"{EXPERTS}.down_proj")
    assert is_fused("model.layers.0.block_sparse_moe.input_linear.weight")
    others = ("experts.0.down_proj.weight", "mlp.down_proj", "experts.up_proj", "down_proj")
    for other in (*others, "shared_mlp.input_linear.weight", "my_experts.down_proj"):
        assert not is_fused(other)
