"""What is to be said of values that were rounded to integers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from permllm_offline.sparsity.rounded_layer import Rounding


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
