"""What a conversion found and did, linear by linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

RUN_TIME, FOLDED, NONE, UNDONE, DENSE = "run time", "folded", "none", "undone", "left dense"


@dataclass(frozen=True)
class ConvertedLinear:
    """One linear: its permutation (``run time``, ``folded``, ``none``), or ``left dense`` and why.

    On the way to a dense checkpoint, ``undone`` or ``none``.

    ``density`` is the share of weights that the source kept; ``int8_error`` the error of weights
    that were rounded, relative to them, or None.
    """

    name: str
    permutation: str
    density: float
    reason: str = ""
    int8_error: float | None = None


@dataclass(frozen=True)
class ConversionReport:
    """A finished conversion."""

    source: str
    source_format: str
    target_format: str
    pattern: str
    block_size: int
    linears: Sequence[ConvertedLinear]
    rounding: str = ""
    """To what values were rounded, and how; empty where none were."""

    @property
    def left_dense(self) -> list[ConvertedLinear]:
        """Linears that do not obey the pattern."""
        return [linear for linear in self.linears if linear.permutation == DENSE]

    def with_int8_errors(self, errors: Mapping[str, float], rounding: str) -> ConversionReport:
        """The same of values that were rounded to int8: their errors by linear, and how."""
        linears = [replace(one, int8_error=errors.get(one.name)) for one in self.linears]
        return replace(self, linears=linears, rounding=rounding)

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for JSON."""
        return asdict(self)
