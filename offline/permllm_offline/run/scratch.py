"""Room for the large arrays of a computation: in memory, or in files that stand in for it.

What lies in a file is mapped into memory. The system holds of it what there is room for, and writes
the rest back, so that a computation that does not fit goes on slowly instead of being killed.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError

Place = Literal["memory", "disk"]
CHUNK_BYTES = 64 << 20
"""At most, of a file that several arrays lie in: a system maps 65530 files at a time, and tuning a
mixture of experts takes more arrays than that."""
SHARING = 16
"""Arrays of one size to such a file."""
_ALIGNMENT = 64


@dataclass(frozen=True)
class Scratch:
    """Where large arrays lie: files in ``directory``, or memory where it is None."""

    directory: Path | None = None
    _chunks: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    """What is left of the last file that several arrays lie in."""

    def zeros(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An array of zeros, of ``device`` unless it lies in a file: then of the CPU.

        A file loses its name before it takes room, and goes with its arrays, or with the process.

        Raises:
            OfflineError: the disk has no room for it, or it cannot be mapped.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.directory is None or size == 0:
            return torch.zeros(shape, dtype=dtype, device=device)
        try:
            return self._take(self.directory, size).view(dtype).view(tuple(shape))
        except (OSError, RuntimeError) as error:
            raise OfflineError(
                f"a scratch file of {size / 1e9:.3g} GB in {self.directory} failed: {error}. Free "
                "some space there, or give --scratch memory."
            ) from error

    def _take(self, directory: Path, size: int) -> Tensor:
        """So many bytes that nothing else has: of a file of their own, or of one for several."""
        room = -(-size // _ALIGNMENT) * _ALIGNMENT
        if room > CHUNK_BYTES // 4:
            return _mapped_file(directory, size)
        if not self._chunks or len(self._chunks[0]) < room:
            self._chunks[:] = [_mapped_file(directory, min(CHUNK_BYTES, SHARING * room))]
        chunk = self._chunks[0]
        self._chunks[:] = [chunk[room:]]
        return chunk[:size]


def _mapped_file(directory: Path, size: int) -> Tensor:
    """Zeros, uint8 [size]. The file stays open nowhere, as there may be thousands."""
    descriptor, name = tempfile.mkstemp(prefix="scratch-", dir=directory)
    try:
        try:
            mapped = torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
        finally:
            Path(name).unlink()
        if hasattr(os, "posix_fallocate"):
            # A page that the disk has no room for would end the process when it is written.
            os.posix_fallocate(descriptor, 0, size)
        return mapped
    finally:
        os.close(descriptor)


MEMORY = Scratch()
