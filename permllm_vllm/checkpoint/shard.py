"""One safetensors file: its headers at once, its tensors when they are asked for."""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from permllm_vllm.checkpoint.contained import checked_name, contained
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader

_LARGEST_PRODUCT = 2**48  # of dimensions: beyond any memory, and within 64 bits
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Shard:
    """An open file; `headers` maps the names of its tensors to shape and dtype.

    `metadata` is what the file says of itself.

    Tensors are read, not mapped: were the file cut short meanwhile, touching a map would end the
    process. Raises `CheckpointError` when it is no whole safetensors file, or a link that leaves
    its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = contained(path.parent, path.name)
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            with safe_open(self.path, framework="pt"):
                pass  # checks header, offsets and length
            length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
            self._start = 8 + length
            entries = json.loads(os.pread(self._descriptor, length, 8))
            self.metadata: dict[str, str] = entries.pop("__metadata__", None) or {}
            self._entries: dict[str, dict[str, Any]] = entries
            self.headers = {
                name: header_of(entry["shape"], entry["dtype"]) for name, entry in entries.items()
            }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise self._problem(f"what cannot be opened: {error}").as_error() from error
        for name in self.headers:
            checked_name(name, path)

    def __getstate__(self) -> None:
        """Raise `TypeError`: elsewhere the number of an open file means another file, or none."""
        raise TypeError(f"{self.path} is open in this process alone: read what others need of it")

    def tensor(self, name: str) -> Tensor:
        """Read one tensor of `headers`; raises `CheckpointError` when its bytes are gone."""
        return self.part(name, 0, self.headers[name].shape)

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a tensor: so many of its elements as they lie, the first is ``start``."""
        entry = self._entries[name]
        dtype = DTYPES.get(entry["dtype"])
        if dtype is None:
            value, rule = f"dtype {entry['dtype']}", f"one of {', '.join(DTYPES)}"
            raise Problem(name, value, rule, "convert the tensor to one of these").as_error()
        content = bytearray(math.prod(shape) * dtype.itemsize)
        if not content:
            return torch.empty(shape, dtype=dtype)
        begin = entry["data_offsets"][0] + start * dtype.itemsize
        try:
            self._read(memoryview(content), self._start + begin)
        except OSError as error:
            raise self._problem(f"what cannot be read: {error}").as_error() from error
        return torch.frombuffer(content, dtype=dtype).view(tuple(shape))

    def _read(self, target: memoryview, offset: int) -> None:
        while target:
            count = os.preadv(self._descriptor, [target], offset)
            if count == 0:
                value = f"a file that ends {len(target)} bytes early"
                raise self._problem(f"{value}: it was cut short while it was read").as_error()
            target, offset = target[count:], offset + count

    def _problem(self, value: str) -> Problem:
        return Problem(str(self.path), value, "a whole safetensors file", FETCH_AGAIN)


def header_of(shape: Sequence[int], dtype: str) -> TensorHeader:
    """Return what a safetensors header says, `dtype` as it is written there.

    Raises `ValueError` when no memory could hold such a tensor.
    """
    if math.prod(max(size, 1) for size in shape) > _LARGEST_PRODUCT:
        raise ValueError(f"shape {list(shape)} is beyond any memory")
    name = str(DTYPES[dtype]).removeprefix("torch.") if dtype in DTYPES else dtype
    return TensorHeader(tuple(shape), name)
