"""Bytes of what updates and tunes kept weights: those that scratch files may hold, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from permllm_offline.model.prune_plan import PlannedLinear
from permllm_offline.reconstruction.kept_values import CHANNEL_BYTES
from permllm_offline.reconstruction.obs import (
    FACTOR_BYTES,
    ROW_BYTES,
    ROWS_AT_ONCE,
    USED_FACTOR_BYTES,
)
from permllm_offline.run.scratch import Place

TRAINED_BYTES = 4 + 8
"""For each kept weight that is tuned: a float32 copy, and the states of Adam."""


@dataclass(frozen=True)
class StateBytes:
    """Of one moment of the work: in scratch, and beside it in memory whatever scratch is."""

    scratch: int
    beside: int

    def in_memory(self, place: Place) -> int:
        """Bytes of memory where scratch lies there."""
        return self.beside + (self.scratch if place == "memory" else 0)


def tuning(linears: Sequence[PlannedLinear], item: int, processes: int = 1) -> StateBytes:
    """While linears are tuned together, shared out to processes.

    Of each kept weight its gradient, the number of its channel, its best value, and what
    ``TRAINED_BYTES`` names; of the linear that is at work its whole gradient, or that of its kept
    weights in float32.
    """
    kept = sum(map(_kept, linears))
    shared = kept * (TRAINED_BYTES + item) // processes
    at_work = max(max(linear.weights * item, _kept(linear) * 4) for linear in linears)
    return StateBytes(shared + kept * (item + CHANNEL_BYTES), at_work)


def _kept(linear: PlannedLinear) -> int:
    """Weights that stay: every supported pattern keeps half."""
    return linear.weights // 2


def updating(linears: Sequence[PlannedLinear]) -> list[StateBytes]:
    """While a decoder layer is updated: a moment is factored, then some rows are after others."""
    found = []
    for linear in linears:
        channels = linear.layout.in_features
        rows = min(linear.out_features, ROWS_AT_ONCE)
        found.append(StateBytes(FACTOR_BYTES * channels**2, 0))
        found.append(StateBytes(USED_FACTOR_BYTES * channels**2, ROW_BYTES * rows * channels))
    return found
