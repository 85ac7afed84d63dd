"""What a conversion found and did, linear by linear."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from permllm_offline.sparsity.rounded_layer import Rounding

RUN_TIME, FOLDED, NONE, UNDONE, DENSE = "run time", "folded", "none", "undone", "left dense"


class FinishedRounding(Protocol):
    """To what values were rounded, how, and what each layer lost."""

    @property
    def values(self) -> Rounding:
        """To what."""
        ...

    @property
    def how(self) -> str:
        """With what text, or without any."""
        ...

    @property
    def errors(self) -> Mapping[str, float]:
        """Of each layer by its name, relative to what ``error_of`` says."""
        ...

    @property
    def error_of(self) -> str:
        """What of a layer: its weights, or its output."""
        ...


@dataclass(frozen=True)
class ConvertedLinear:
    """One linear: its permutation (``run time``, ``folded``, ``none``), or ``left dense`` and why.

    On the way to a dense checkpoint, ``undone`` or ``none``.

    ``density`` is the share of weights that the source kept; ``rounding_error`` the relative error
    of a linear whose values were rounded, of its output with calibration text, else of its weights.
    """

    name: str
    permutation: str
    density: float
    reason: str = ""
    rounding_error: float | None = None


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

    def rounded(self, rounding: FinishedRounding) -> ConversionReport:
        """The same of values that were rounded: their errors by linear, and how."""
        errors = rounding.errors
        linears = [replace(one, rounding_error=errors.get(one.name)) for one in self.linears]
        return replace(self, linears=linears, rounding=f"{rounding.values}, {rounding.how}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dictionary, for JSON."""
        return asdict(self)
