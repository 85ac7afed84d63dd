"""vLLM's loader gets whole safetensors files of the checkpoint's own directory, or nothing."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig

from permllm_vllm.checkpoint.errors import CheckpointError
from tests.quantization.sparse_modules import config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    return directory


def save(path: Path, name: str = "w") -> Path:
    save_file({name: torch.zeros(64)}, path)
    return path


def pickled(path: Path) -> Path:
    torch.save({"w": torch.zeros(64)}, path)
    return path


def about_to_load(directory: Path) -> None:
    """What vLLM calls when it has read the configuration."""
    config().maybe_update_config(str(directory), hf_config=PreTrainedConfig())


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        about_to_load(directory)
    return str(error.value)


def test_a_whole_file_is_taken(directory: Path) -> None:
    save(directory / SINGLE)
    pickled(directory / "training_args.bin")
    save(directory / "._hidden.safetensors").write_bytes(b"not looked at")
    about_to_load(directory)


def test_shards_are_taken(directory: Path) -> None:
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))
    for tensor, file in names.items():
        save(directory / file, tensor)
    about_to_load(directory)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth"])
def test_pickled_weights_are_refused(directory: Path, name: str) -> None:
    pickled(directory / name)
    assert "no safetensors weights" in refusal(directory)


def test_pickled_weights_under_a_safe_name(directory: Path) -> None:
    pickled(directory / SINGLE)
    assert "a whole safetensors file" in refusal(directory)


@pytest.mark.parametrize("name", [SINGLE, "another.safetensors", "consolidated.safetensors"])
def test_a_link_out_of_the_directory(directory: Path, tmp_path: Path, name: str) -> None:
    """Also one that the format does not know: vLLM reads every file of this ending."""
    outside = save(tmp_path / "outside.safetensors")
    if name != SINGLE:
        save(directory / SINGLE)
    (directory / name).symlink_to(outside)
    message = refusal(directory)
    assert f"{name}: found a link to {outside.resolve()}" in message
    assert "copy the file in place of the link" in message


def test_a_linked_index(directory: Path, tmp_path: Path) -> None:
    save(directory / "one.safetensors")
    outside = tmp_path / INDEX
    outside.write_text(json.dumps({"weight_map": {"w": "one.safetensors"}}))
    (directory / INDEX).symlink_to(outside)
    assert "found a link to" in refusal(directory)


def test_an_index_that_leaves_the_directory(directory: Path, tmp_path: Path) -> None:
    save(tmp_path / "outside.safetensors")
    content = {"weight_map": {"w": "../outside.safetensors"}}
    (directory / INDEX).write_text(json.dumps(content))
    assert "'../outside.safetensors'" in refusal(directory)


def test_a_shard_that_is_not_there(directory: Path) -> None:
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))
    save(directory / "two.safetensors", "b")
    assert "one.safetensors: found what cannot be opened" in refusal(directory)


@pytest.mark.parametrize("indexed", [False, True])
def test_weights_that_are_streamed_from_elsewhere(directory: Path, indexed: bool) -> None:
    """vLLM fetches what is small of `s3://` into a directory, the index too, and no weights."""
    (directory / "config.json").write_text("{}")
    (directory / "model.tensors").write_bytes(b"tensorizer's")
    if indexed:
        (directory / INDEX).write_text(json.dumps({"weight_map": {"w": "one.safetensors"}}))
    about_to_load(directory)


@pytest.mark.parametrize(
    "file", ["model-rank-0-part-0.safetensors", "model-pp-1-tp-0-part-2.safetensors"]
)
def test_a_sharded_state_of_vllm(directory: Path, file: str) -> None:
    save(directory / file)
    message = refusal(directory)
    assert f"{directory / file} is read as vLLM's state of a packed model" in message
    assert "the directory that `permllm-offline prune` wrote" in message


@pytest.mark.parametrize("lost", [1, 200, 300])
def test_a_truncated_shard(directory: Path, lost: int) -> None:
    """Of the data, all of it and some of the header, or nearly everything."""
    names = {"a": "one.safetensors", "b": "two.safetensors"}
    (directory / INDEX).write_text(json.dumps({"weight_map": names}))
    for tensor, file in names.items():
        save(directory / file, tensor)
    shard = directory / "two.safetensors"
    os.truncate(shard, shard.stat().st_size - lost)
    message = refusal(directory)
    assert "two.safetensors: found what cannot be opened" in message
    assert "fetch or write the checkpoint again" in message


def test_a_hub_name_is_left_to_vllm() -> None:
    config().maybe_update_config("some/model", hf_config=PreTrainedConfig())
