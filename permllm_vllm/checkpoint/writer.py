"""Write a checkpoint directory: streamed, and either complete or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint.checksums import CHECKSUMS_NAME, checksums_of
from permllm_vllm.checkpoint.companions import (
    WEIGHT_SUFFIXES,
    check_companions,
    copy_companions,
)
from permllm_vllm.checkpoint.errors import CheckpointError, Problem, raise_if_any
from permllm_vllm.checkpoint.headers import TensorHeader, checkpoint_problems
from permllm_vllm.checkpoint.output import (
    check_destination,
    check_disk,
    disk_errors_named,
    replaced_at_the_end,
)
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.shards import CONFIG_NAME, INDEX_NAME, SINGLE_NAME, read_json
from permllm_vllm.checkpoint.stored_otherwise import QUANTIZATION_KEYS

MAX_SHARD_BYTES = 5_000_000_000

_NOTHING: Mapping[str, Any] = MappingProxyType({})

Content = str | bytes | Callable[[], str | bytes]
"""What a file beside the weights holds."""


def write_checkpoint(
    output: str | os.PathLike[str],
    tensors: Iterable[tuple[str, Tensor]],
    quantization: QuantizationConfig | None,
    source: str | os.PathLike[str],
    *,
    force: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    total_bytes: int | None = None,
    config_updates: Mapping[str, Any] = _NOTHING,
    extra_files: Mapping[str, Content | None] = _NOTHING,
) -> None:
    """Write `tensors`, and everything of `source` but its weights, to the directory `output`.

    `tensors` yields (name, tensor) once each and is consumed lazily: one shard of at most
    `max_shard_bytes` (or one single larger tensor) is held in memory. `quantization` None writes a
    dense checkpoint. `total_bytes` is what the tensors will take, for the check of free disk; by
    default the size of the weights of `source`. `config_updates` are merged into `config.json`,
    `extra_files` (relative name -> content) written beside it, replacing copies from `source`; None
    leaves the copy out, and a function is asked for the content when all tensors are written.

    The directory appears under its name only when it is complete; `SHA256SUMS` in it records its
    weight files. Raises `CheckpointError`, leaving what was there as it was, when `output` is not
    empty (unless `force`), the disk is too small, a file of `source` cannot be read, a name comes
    twice, or the tensors break a rule of the format.
    """
    output, source = Path(output), Path(source)
    config = read_json(source / CONFIG_NAME)
    _check_extra_files(extra_files)
    check_destination(output, source, force=force)
    check_companions(source)
    check_disk(output, _weight_bytes(source) if total_bytes is None else total_bytes)
    config = {
        key: _of_these_weights(value) if isinstance(value, dict) else value
        for key, value in _of_these_weights({**config, **config_updates}).items()
    }
    if quantization is not None:
        config["quantization_config"] = quantization.to_dict()

    with replaced_at_the_end(output, force=force) as directory:
        headers = _write_shards(directory, tensors, max_shard_bytes)
        if quantization is not None:
            raise_if_any(checkpoint_problems(headers, quantization))
        with disk_errors_named(directory):
            copy_companions(source, directory)
            _write_file(directory / CONFIG_NAME, json.dumps(config, indent=2) + "\n")
            for name, content in extra_files.items():
                if content is None:
                    (directory / name).unlink(missing_ok=True)
                else:
                    _write_file(directory / name, content)
            _write_file(directory / CHECKSUMS_NAME, checksums_of(directory))


def _of_these_weights(config: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a configuration says of the source's quantization, and of code of its own.

    No such code is run here: what is written is for the classes of Transformers and vLLM.
    """
    left_out = {*QUANTIZATION_KEYS, "auto_map"}
    return {key: value for key, value in config.items() if key not in left_out}


def _write_shards(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> dict[str, TensorHeader]:
    """Write the tensors to shards and, when there are several, their index."""
    headers: dict[str, TensorHeader] = {}
    shards: list[list[str]] = []
    total = 0
    for shard in _shards(tensors, max_shard_bytes):
        headers.update({name: _header(tensor) for name, tensor in shard.items()})
        total += sum(tensor.nbytes for tensor in shard.values())
        path = directory / f"{len(shards) + 1}.safetensors"
        with disk_errors_named(path):
            path.touch()
            mode = path.stat().st_mode
            save_file(shard, path, metadata={"format": "pt"})
            path.chmod(mode)  # safetensors leaves its file to its owner alone
        shards.append(list(shard))
        shard.clear()  # freed before the next one is collected
    if not shards:
        raise CheckpointError(
            "no tensors to write; rule: a checkpoint has weights; remedy: give the model's tensors"
        )
    if len(shards) == 1:
        (directory / "1.safetensors").rename(directory / SINGLE_NAME)
        return headers
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"{number}.safetensors").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_file(directory / INDEX_NAME, json.dumps(index, indent=2) + "\n")
    return headers


def _shards(
    tensors: Iterable[tuple[str, Tensor]], max_shard_bytes: int
) -> Iterator[dict[str, Tensor]]:
    """Collect tensors until the next one would exceed `max_shard_bytes`."""
    shard: dict[str, Tensor] = {}
    size = 0
    seen: set[str] = set()
    for name, tensor in tensors:
        if name in seen:
            rule, remedy = "every tensor is written once", "give each tensor one name"
            raise Problem(name, "a second tensor of this name", rule, remedy).as_error()
        seen.add(name)
        if shard and size + tensor.nbytes > max_shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = _owned(tensor)
        size += tensor.nbytes
        del tensor  # freed before the next one is made
    if shard:
        yield shard


def _header(tensor: Tensor) -> TensorHeader:
    return TensorHeader(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _owned(tensor: Tensor) -> Tensor:
    """Return the tensor on the CPU, contiguous, with memory that it shares with nobody.

    safetensors refuses tensors that share memory, and a view would keep its whole base alive.
    """
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _weight_bytes(source: Path) -> int:
    return sum(path.stat().st_size for path in source.glob("*.safetensors"))


def _check_extra_files(extra_files: Iterable[str]) -> None:
    for name in extra_files:
        path = Path(name)
        reserved = name in (CONFIG_NAME, CHECKSUMS_NAME) or name.endswith(WEIGHT_SUFFIXES)
        if reserved or path.is_absolute() or ".." in path.parts or not path.parts:
            raise CheckpointError(
                f"extra file {name!r}; rule: a relative name inside the checkpoint, neither "
                f"{CONFIG_NAME}, {CHECKSUMS_NAME} nor weights; remedy: use another name"
            )


def _write_file(path: Path, content: Content) -> None:
    if not isinstance(content, str | bytes):
        content = content()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
