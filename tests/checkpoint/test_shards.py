import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import read_headers, read_json, read_weight_map


def write_index(directory: Path, weight_map: object) -> None:
    content = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(content)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/secret.safetensors",
        "sub/a.safetensors",
        "..\\a.safetensors",
        ".hidden.safetensors",
        "a.bin",
        "..",
        "",
        "a\0.safetensors",
        7,
        None,
    ],
)
def test_an_index_that_leaves_the_directory_is_refused(tmp_path: Path, file: object) -> None:
    inside = tmp_path / "checkpoint"
    inside.mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    write_index(inside, {"w": file})
    with pytest.raises(CheckpointError, match=r"tensor w in file .*plain name of a") as refusal:
        read_weight_map(inside)
    assert repr(file) in str(refusal.value)


@pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        read_weight_map(tmp_path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        read_weight_map(tmp_path)


def test_links_to_a_blob_store_are_followed(tmp_path: Path) -> None:
    (tmp_path / "snapshot").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "blob")
    os.symlink(tmp_path / "blob", tmp_path / "snapshot" / "model.safetensors")
    assert read_weight_map(tmp_path / "snapshot") == {"w": "model.safetensors"}


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '"x"', '{"a": 1, "a": 2}', "[" * 100_000, "\ud800"]
)
def test_broken_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(CheckpointError, match=r"config\.json: found .*a JSON object"):
        read_json(path)


def test_headers_are_read_without_tensors(tmp_path: Path) -> None:
    tensors = {
        str(dtype).removeprefix("torch."): torch.zeros(2, 3, dtype=dtype)
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
    save_file(tensors, tmp_path / "a.safetensors")
    headers = read_headers(tmp_path / "a.safetensors")
    assert headers == {name: ((2, 3), name) for name in tensors}


@pytest.mark.parametrize("cut", [0, 4, 8, 40, -1])
def test_truncated_files_are_named(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: found .*whole safetensors"):
        read_headers(path)
    with pytest.raises(CheckpointError, match="fetch or write the checkpoint again"):
        read_headers(tmp_path / "absent.safetensors")
