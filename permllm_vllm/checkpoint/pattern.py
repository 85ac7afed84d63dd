"""The sparsity pattern N:M."""

from __future__ import annotations

from typing import NamedTuple

SUPPORTED = ("2:4", "4:8", "8:16", "32:64")
"""From the strictest to the loosest: what obeys one obeys those after it."""

MASK_BYTE = 8
"""Input channels whose mask bits share a byte."""


class Pattern(NamedTuple):
    """In every group of `group` consecutive permuted input channels, `kept` weights are kept."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read one of `SUPPORTED`; raises `ValueError` for anything else."""
        if text not in SUPPORTED:
            raise ValueError(
                f"pattern {text!r} is not supported: the kernels keep half of every group of 4, 8, "
                f"16 or 64 channels; use one of {', '.join(SUPPORTED)}"
            )
        kept, group = text.split(":")
        return cls(int(kept), int(group))

    @property
    def multiple(self) -> int:
        """Input channels come in multiples of this: whole groups, and whole bytes of the mask."""
        return max(self.group, MASK_BYTE)

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"
