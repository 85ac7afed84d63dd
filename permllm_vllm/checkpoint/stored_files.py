"""The safetensors files of a checkpoint directory, seen as one: headers, and parts of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Protocol

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.shards import read_weight_map


class TensorParts(Protocol):
    """The tensors of a checkpoint directory, of which parts can be read."""

    directory: Path

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        ...

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor; raises `CheckpointError` when it is not there."""
        ...

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a tensor: so many of its elements as they lie, the first is `start`."""
        ...


def not_there(name: str, directory: Path) -> Problem:
    """Return what to say of a name that is none of the tensors of a directory."""
    remedy = f"ask for one of `names()`, or {FETCH_AGAIN}"
    return Problem(name, f"nothing in {directory}", "only stored tensors can be read", remedy)


class StoredFiles:
    """What the files hold under the names that they have for it; each is opened when it is needed.

    Raises `CheckpointError` for a directory without weights, and for files that are not whole.
    """

    def __init__(self, directory: str | PathLike[str]) -> None:
        self.directory = Path(directory)
        self._files = read_weight_map(self.directory)
        self._shards: dict[str, Shard] = {}

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._files.keys()

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor; raises `CheckpointError` when it is not there."""
        return self._shard(name).headers[name]

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a tensor: so many of its elements as they lie, the first is `start`."""
        return self._shard(name).part(name, start, shape)

    def _shard(self, name: str) -> Shard:
        """Return the open file that holds a tensor."""
        file = self._files.get(name)
        if file is None:
            raise not_there(name, self.directory).as_error()
        if file not in self._shards:
            self._shards[file] = Shard(self.directory / file)
        shard = self._shards[file]
        if name not in shard.headers:
            value = f"nothing in {self.directory / file}"
            raise Problem(name, value, "the file holds what the index says", FETCH_AGAIN).as_error()
        return shard
