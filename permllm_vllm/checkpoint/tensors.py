"""The tensors of a checkpoint directory by name, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.fused_experts import Part, is_fused, parts_of
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.shard import Shard
from permllm_vllm.checkpoint.shards import read_weight_map


class StoredTensors:
    """What the safetensors files of a directory hold, whatever it means.

    Fused experts whose names begin with `experts_under` are seen as separate ones. Raises
    `CheckpointError` for a directory without weights, for files that are not whole, and for experts
    that are stored both ways.
    """

    def __init__(self, directory: str | PathLike[str], *, experts_under: str | None = None) -> None:
        self.directory = Path(directory)
        self._files = read_weight_map(self.directory)
        self._shards: dict[str, Shard] = {}
        self._parts: dict[str, Part] = {}
        if experts_under is not None:
            self._separate(name for name in self._files if name.startswith(experts_under))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> list[str]:
        """List the tensors, layer 2 before layer 10."""
        return natural_order(self._files)

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor without reading it."""
        shard, part = self._shard(name), self._parts.get(name)
        if part is None:
            return shard.headers[name]
        return TensorHeader(part.shape, shard.headers[part.tensor].dtype)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raises `CheckpointError` when it is not there."""
        shard, part = self._shard(name), self._parts.get(name)
        return shard.tensor(name) if part is None else shard.part(*part)

    def _separate(self, names: Iterable[str]) -> None:
        """Put the matrices of fused experts in their place."""
        for fused in [name for name in names if is_fused(name)]:
            parts = dict(parts_of(fused, self.header(fused).shape))
            for name in parts:
                if name in self._files:
                    value, rule = f"also a part of {fused}", "every tensor is stored once"
                    raise Problem(name, value, rule, FETCH_AGAIN).as_error()
            if parts:
                self._parts |= parts
                self._files |= dict.fromkeys(parts, self._files.pop(fused))

    def _shard(self, name: str) -> Shard:
        """Return the open file that holds a tensor."""
        file = self._files.get(name)
        if file is None:
            value = f"nothing in {self.directory}"
            rule = "only stored tensors can be read"
            raise Problem(
                name, value, rule, f"ask for one of `names()`, or {FETCH_AGAIN}"
            ).as_error()
        if file not in self._shards:
            self._shards[file] = Shard(self.directory / file)
        shard = self._shards[file]
        if name not in self._parts and name not in shard.headers:
            value = f"nothing in {self.directory / file}"
            raise Problem(name, value, "the file holds what the index says", FETCH_AGAIN).as_error()
        return shard
