import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.shards import (
    read_headers,
    read_json,
    read_weight_map,
    require_one_set,
)


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


def test_two_sets_of_weights_are_refused(tmp_path: Path) -> None:
    weights = {"w": torch.zeros(1)}
    save_file(weights, tmp_path / "model.safetensors")
    save_file(weights, tmp_path / "model-00001-of-00001.safetensors")
    write_index(tmp_path, {"w": "model-00001-of-00001.safetensors"})
    with pytest.raises(CheckpointError, match=r"rule: one set .* remedy: remove the older one"):
        require_one_set(tmp_path)
    write_index(tmp_path, {"w": "model.safetensors"})
    require_one_set(tmp_path)
    write_index(tmp_path, {"w": "model-00001-of-00001.safetensors"})
    (tmp_path / "model.safetensors").unlink()
    require_one_set(tmp_path)


def test_links_into_the_blobs_of_a_hub_cache_are_followed(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    (tmp_path / "models--a--b" / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, tmp_path / "models--a--b" / "blobs" / "4567")
    os.symlink("../../blobs/4567", snapshot / "model.safetensors")
    assert read_weight_map(snapshot) == {"w": "model.safetensors"}
    (tmp_path / "link").symlink_to(snapshot)
    assert read_weight_map(tmp_path / "link") == {"w": "model.safetensors"}


def test_links_inside_the_directory_are_followed(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "other.safetensors")
    os.symlink("other.safetensors", tmp_path / "model.safetensors")
    assert read_weight_map(tmp_path) == {"w": "model.safetensors"}


def test_links_out_of_the_directory_are_refused(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    save_file({"w": torch.zeros(1)}, tmp_path / "secret.safetensors")
    (tmp_path / "secret.json").write_text("{}")
    for name in ("model.safetensors", "config.json"):
        (tmp_path / "inside" / name).symlink_to(tmp_path / f"secret{Path(name).suffix}")
    with pytest.raises(CheckpointError, match=r"found a link to .*secret.*copy the file in"):
        read_weight_map(tmp_path / "inside")
    with pytest.raises(CheckpointError, match=r"found a link to .*secret.*copy the file in"):
        read_json(tmp_path / "inside" / "config.json")


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for a writer."""
    for name in ("config.json", "model.safetensors"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match="found no regular file"):
        read_json(tmp_path / "config.json")
    with pytest.raises(CheckpointError, match="found no regular file"):
        read_headers(tmp_path / "model.safetensors")


def test_a_huge_json_file_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="1099511627776 bytes, and at most 100000000"):
        read_json(tmp_path / "config.json")


def test_many_equal_keys_take_linear_time(tmp_path: Path) -> None:
    keys = ", ".join(f'"{number}": 1' for number in range(300_000))
    (tmp_path / "config.json").write_text(f'{{{keys}, "last": 1, "last": 1}}')
    with pytest.raises(CheckpointError, match="the key 'last' is there twice"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["a" * 1001, "a\n", "\x1b[2J", "\ud800", ""])
def test_names_that_no_tensor_has_are_refused(tmp_path: Path, name: str) -> None:
    write_index(tmp_path, {name: "a.safetensors"})
    with pytest.raises(CheckpointError, match=r"names of 1 to 1000 printable") as refusal:
        read_weight_map(tmp_path)
    assert str(refusal.value).isprintable()
    assert len(str(refusal.value)) < 1500


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
