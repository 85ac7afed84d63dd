"""Find and open the safetensors files of a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.headers import TensorHeader

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FETCH_AGAIN = "fetch or write the checkpoint again"

DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; raises `CheckpointError` if it is missing, broken or has a key twice."""
    rule = "a checkpoint directory has this file, a JSON object"
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        remedy = "give the directory of a Hugging Face or permllm checkpoint"
        raise Problem(str(path), "nothing", rule, remedy).as_error() from None
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(
            str(path), f"what cannot be read: {error}", rule, FETCH_AGAIN
        ).as_error() from error
    if not isinstance(content, dict):
        raise Problem(str(path), type(content).__name__, rule, FETCH_AGAIN).as_error()
    return content


def read_weight_map(directory: Path) -> dict[str, str]:
    """Map every tensor to the file that holds it, from the index or from the single file.

    Raises `CheckpointError` when there is neither, or when the index names anything but plain
    `*.safetensors` files of this directory.
    """
    index = directory / INDEX_NAME
    if not index.exists():
        if not (directory / SINGLE_NAME).exists():
            rule = f"weights are in {SINGLE_NAME} or in the files of {INDEX_NAME}"
            remedy = "save the model as safetensors, for example with `save_pretrained`"
            raise Problem(str(directory), "no safetensors weights", rule, remedy).as_error()
        return dict.fromkeys(read_headers(directory / SINGLE_NAME), SINGLE_NAME)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        rule = "weight_map maps every tensor to its file"
        raise Problem(str(index), "no weight_map", rule, FETCH_AGAIN).as_error()
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain_name(file):
            value = f"tensor {tensor} in file {file!r}"
            rule = "the plain name of a *.safetensors file of the same directory"
            remedy = "do not use this checkpoint unless you trust its origin; fetch it again"
            raise Problem(str(index), value, rule, remedy).as_error()
    return weight_map


def open_shard(path: Path) -> safe_open:
    """Map a safetensors file into memory; raises `CheckpointError` when it is no whole one."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        value = f"what cannot be opened: {error}"
        raise Problem(
            str(path), value, "a whole safetensors file", FETCH_AGAIN
        ).as_error() from error


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of every tensor of one file; raises `CheckpointError` like `open_shard`."""
    shard = open_shard(path)
    return {name: read_header(shard, name) for name in shard.keys()}  # noqa: SIM118


def read_header(shard: safe_open, name: str) -> TensorHeader:
    """Read the header of one tensor of an open shard."""
    part = shard.get_slice(name)
    return TensorHeader(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))


def _is_plain_name(file: str) -> bool:
    return (
        file.endswith(".safetensors")
        and not file.startswith(".")
        and not any(character in file for character in "/\\\0")
    )


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} is there twice")
    return content
