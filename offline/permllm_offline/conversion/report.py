"""What a conversion found and did, linear by linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

RUN_TIME, FOLDED, NONE, UNDONE, DENSE = "run time", "folded", "none", "undone", "left dense"


@dataclass(frozen=True)
class ConvertedLinear:
    """One linear: its permutation (``run time``, ``folded``, ``none``), or ``left dense`` and why.

    On the way to a dense checkpoint, ``undone`` or ``none``.

    ``density`` is the share of weights that the source kept.
    """

    name: str
    permutation: str
    density: float
    reason: str = ""


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion."""

    source: str
    source_format: str
    target_format: str
    pattern: str
    block_size: int
    linears: Sequence[ConvertedLinear]

    @property
    def left_dense(self) -> list[ConvertedLinear]:
        """Linears that do not obey the pattern."""
        return [linear for linear in self.linears if linear.permutation == DENSE]

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for JSON."""
        return asdict(self)
