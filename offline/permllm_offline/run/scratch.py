"""Room for the large arrays of a computation: in memory, or in files that stand in for it.

What lies in a file is mapped into memory. The system holds of it what there is room for, and writes
the rest back, so that a computation that does not fit goes on slowly instead of being killed.
"""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError

_OPEN_FILES = Path("/proc/self/fd")
"""Where Linux has what a process has open, without a name too."""
Place = Literal["memory", "disk"]


@dataclass(frozen=True)
class Scratch:
    """Where large arrays lie: files in ``directory``, or memory where it is None."""

    directory: Path | None = None

    def zeros(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An array of zeros, of ``device`` unless it lies in a file: then of the CPU.

        A file loses its name before it takes room, and goes with its array, or with the process.

        Raises:
            OfflineError: the disk has no room for it, or it cannot be mapped.
        """
        size = math.prod(shape) * dtype.itemsize
        if self.directory is None or size == 0:
            return torch.zeros(shape, dtype=dtype, device=device)
        try:
            return _in_file(self.directory, size, dtype).view(tuple(shape))
        except (OSError, RuntimeError) as error:
            raise OfflineError(
                f"a scratch file of {size / 1e9:.3g} GB in {self.directory} failed: {error}. Free "
                "some space there, or give --scratch memory."
            ) from error


def _in_file(directory: Path, size: int, dtype: torch.dtype) -> Tensor:
    """Zeros of so many bytes, mapped; the file stays open nowhere, as there are thousands."""
    descriptor, name = tempfile.mkstemp(prefix="scratch-", dir=directory)
    try:
        Path(name).unlink()
        if hasattr(os, "posix_fallocate"):
            # A page that the disk has no room for would end the process when it is written.
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.ftruncate(descriptor, size)
        if not _OPEN_FILES.exists():  # a map of Python's holds its file open
            return torch.frombuffer(mmap.mmap(descriptor, size), dtype=dtype)
        nameless = str(_OPEN_FILES / str(descriptor))
        return torch.from_file(nameless, shared=True, size=size // dtype.itemsize, dtype=dtype)
    finally:
        os.close(descriptor)


MEMORY = Scratch()
