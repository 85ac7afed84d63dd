"""What passes from one decoder layer to the next, window by window."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

HIDDEN = "hidden"
"""Name of the hidden states among the tensors."""


@dataclass(frozen=True)
class States:
    """Hidden states of windows: [windows, sequence_length, hidden]."""

    hidden: Tensor

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.hidden)

    def __getitem__(self, windows: slice | Tensor) -> States:
        """The states of some windows."""
        return States(self.hidden[windows])

    def to(self, device: torch.device) -> States:
        """The same on a device."""
        return States(self.hidden.to(device))

    def one_by_one(self) -> Iterator[States]:
        """Yield the states of each window."""
        return (self[index : index + 1] for index in range(len(self)))

    def tensors(self) -> dict[str, Tensor]:
        """By name what layers give, and ``with_tensors`` takes."""
        return {HIDDEN: self.hidden}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> States:
        """The states of the same windows from what ``tensors`` gave."""
        return States(tensors[HIDDEN])
