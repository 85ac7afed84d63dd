"""Room for the large arrays of a computation: in memory, or in files that stand in for it.

What lies in a file is mapped into memory. The system holds of it what there is room for, and writes
the rest back, so that a computation that does not fit goes on slowly instead of being killed.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from permllm_vllm.checkpoint.output import disk_errors_named


@dataclass(frozen=True)
class Scratch:
    """Where large arrays lie: files in ``directory``, or memory where it is None."""

    directory: Path | None = None

    @property
    def on_disk(self) -> bool:
        """Whether arrays lie in files."""
        return self.directory is not None

    def zeros(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> Tensor:
        """An array of zeros, of ``device`` unless it lies in a file: then of the CPU.

        A file has no name from the start, and goes with its array, or with the process.

        Raises:
            CheckpointError: the disk has no room for it.
        """
        size = math.prod(shape)
        if self.directory is None or size == 0:
            return torch.zeros(shape, dtype=dtype, device=device)
        with disk_errors_named(self.directory):
            descriptor, name = tempfile.mkstemp(prefix="scratch-", dir=self.directory)
            try:
                # A page that the disk has no room for would end the process when it is written.
                os.posix_fallocate(descriptor, 0, size * dtype.itemsize)
                array = torch.from_file(name, shared=True, size=size, dtype=dtype)
            finally:
                os.close(descriptor)
                Path(name).unlink()
        return array.view(tuple(shape))


MEMORY = Scratch()
