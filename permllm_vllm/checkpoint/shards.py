"""Find and open the safetensors files of a checkpoint directory."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from permllm_vllm.checkpoint.contained import checked_name, contained, is_plain_name
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, CheckpointError, Problem
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.shard import Shard

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
LARGEST_JSON = 100_000_000  # bytes; the index of a model of 100 000 tensors has a tenth of it


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a checkpoint directory.

    Raises `CheckpointError` if it is missing, broken, too large, a link out of the directory, or
    has a key twice.
    """
    rule = "a checkpoint directory has this file, a JSON object"
    try:
        content = json.loads(read_text(path), object_pairs_hook=_unique_keys)
    except FileNotFoundError:
        remedy = "give the directory of a Hugging Face or permllm checkpoint"
        raise Problem(str(path), "nothing", rule, remedy).as_error() from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise Problem(
            str(path), f"what cannot be read: {error}", rule, FETCH_AGAIN
        ).as_error() from error
    if not isinstance(content, dict):
        raise Problem(str(path), type(content).__name__, rule, FETCH_AGAIN).as_error()
    return content


def read_text(path: Path) -> str:
    """Read a text file of a checkpoint directory.

    Raises `OSError` or `ValueError` when it cannot be read or is too large, and `CheckpointError`
    for a link out of the directory.
    """
    size = contained(path.parent, path.name).stat().st_size
    if size > LARGEST_JSON:
        raise OSError(f"it has {size} bytes, and at most {LARGEST_JSON} are read")
    return path.read_text(encoding="utf-8")


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
        checked_name(tensor, index)
        if not is_plain_name(file):
            value = f"tensor {tensor} in file {file!r}"
            rule = "the plain name of a *.safetensors file of the same directory"
            remedy = "do not use this checkpoint unless you trust its origin; fetch it again"
            raise Problem(str(index), value, rule, remedy).as_error()
    return weight_map


def require_one_set(directory: Path) -> None:
    """Raise `CheckpointError` for an index beside a single file that it does not name.

    Of the two, Transformers takes the file and vLLM the index.
    """
    if not all((directory / name).exists() for name in (INDEX_NAME, SINGLE_NAME)):
        return
    if SINGLE_NAME not in read_weight_map(directory).values():
        value = f"{SINGLE_NAME}, and {INDEX_NAME} that does not name it"
        rule = "one set of weights: of two, some readers take the one and some the other"
        raise Problem(str(directory), value, rule, "remove the older one").as_error()


def read_headers(path: Path) -> dict[str, TensorHeader]:
    """Read the header of every tensor of one file; raises `CheckpointError` like `Shard`."""
    return Shard(path).headers


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(twice, _)] = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {twice!r} is there twice")
    return content
