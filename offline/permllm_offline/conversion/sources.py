"""What a sparse checkpoint of another tool is to a conversion: weights, and which were kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.shards import read_weight_map


class WeightSource(Protocol):
    """A checkpoint seen as a plain one: names, shapes and tensors of a Hugging Face model."""

    description: str
    config_updates: Mapping[str, Any]
    """What `config.json` must say instead, once the weights are stored in another way."""

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        ...

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor, which is not read."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The dense tensor."""
        ...

    def kept(self, name: str) -> Tensor:
        """Which weights of a matrix are stored, or not zero: bool, of the same shape."""
        ...


class StoredTensors:
    """The tensors of a directory by name, read when they are asked for, whatever they mean."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files = read_weight_map(directory)
        self._shards: dict[str, Shard] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return natural_order(self._files)

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor; raises CheckpointError where the file has no such one."""
        return self._shard(name).headers[name]

    def tensor(self, name: str) -> Tensor:
        """A tensor; raises CheckpointError where the file has no such one."""
        return self._shard(name).tensor(name)

    def _shard(self, name: str) -> Shard:
        file = self._files[name]
        if file not in self._shards:
            self._shards[file] = Shard(self.directory / file)
        shard = self._shards[file]
        if name not in shard.headers:
            rule = "the file holds what the index says"
            raise Problem(name, f"nothing in {shard.path}", rule, FETCH_AGAIN).as_error()
        return shard
