"""The sparsity pattern N:M."""

from __future__ import annotations

from typing import NamedTuple

SUPPORTED = ("2:4", "4:8")


class Pattern(NamedTuple):
    """In every group of `group` consecutive permuted input channels, `kept` weights are kept."""

    kept: int
    group: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read "2:4" or "4:8"; raises `ValueError` for anything else."""
        if text not in SUPPORTED:
            raise ValueError(
                f"pattern {text!r} is not supported: the kernels and the mask layout keep half of "
                f"every group of 4 or 8 channels; use one of {', '.join(SUPPORTED)}"
            )
        kept, group = text.split(":")
        return cls(int(kept), int(group))

    def __str__(self) -> str:
        return f"{self.kept}:{self.group}"
