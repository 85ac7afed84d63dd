import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shard import Shard


def write_raw(path: Path, header: object, content: bytes) -> Path:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def test_every_dtype_comes_back(tmp_path: Path) -> None:
    tensors = {
        str(dtype): torch.arange(6).view(2, 3).to(dtype)
        for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.bool)
    }
    tensors |= {"float8": torch.ones(3).to(torch.float8_e4m3fn), "scalar": torch.tensor(2.5)}
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt"})
    shard = Shard(tmp_path / "a.safetensors")
    assert shard.headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        read = shard.tensor(name)
        assert read.dtype == tensor.dtype
        assert read.shape == tensor.shape == shard.headers[name].shape
        assert torch.equal(read.double(), tensor.double())


def test_a_file_that_is_cut_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    """A memory map would end the process here."""
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(100_000)}, path)
    shard = Shard(path)
    os.truncate(path, 5000)
    with pytest.raises(CheckpointError, match=r"ends \d+ bytes early: it was cut short"):
        shard.tensor("w")


def test_a_file_that_is_removed_or_replaced_is_still_the_one_that_was_opened(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(3)}, path)
    shard = Shard(path)
    save_file({"w": torch.zeros(3)}, tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").replace(path)
    assert shard.tensor("w").tolist() == [1, 1, 1]
    path.unlink()
    assert shard.tensor("w").tolist() == [1, 1, 1]


def test_an_open_file_goes_to_no_other_process(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(TypeError, match="open in this process alone"):
        pickle.dumps(Shard(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "shape", [[2**63, 0], [0, 2**47, 2**47], [2**47, 2**47, 0], [2**62, 4, 0], [2**64 - 1, 0]]
)
def test_shapes_beyond_any_memory_are_refused(tmp_path: Path, shape: list[int]) -> None:
    header = {"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    path = write_raw(tmp_path / "a.safetensors", header, b"")
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        Shard(path)


def test_a_header_that_promises_more_than_the_file_has_is_refused(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    with pytest.raises(CheckpointError, match="whole safetensors file"):
        Shard(write_raw(tmp_path / "a.safetensors", header, b""))


def test_an_unknown_dtype_is_named(tmp_path: Path) -> None:
    header = {"w": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]}}
    shard = Shard(write_raw(tmp_path / "a.safetensors", header, b"abcd"))
    with pytest.raises(CheckpointError, match=r"dtype F8_E8M0.*one of F64"):
        shard.tensor("w")


def test_names_are_checked(tmp_path: Path) -> None:
    save_file({"a\x1b[2J": torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="printable characters"):
        Shard(tmp_path / "a.safetensors")
