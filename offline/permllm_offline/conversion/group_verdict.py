"""What was found out about one shared-input group of one decoder layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from permllm_offline.model.layout import GroupLayout


@dataclass(frozen=True)
class GroupVerdict:
    """What was found out about the linears of one shared-input group of one decoder layer.

    ``permutation`` is block-local uint8 [in] in canonical form, None for the original order.
    ``reason`` says why the group does not obey the pattern; empty if it does. ``density`` is the
    share of weights that were kept, by linear.
    """

    layout: GroupLayout
    permutation: Tensor | None
    reason: str
    density: Mapping[str, float]

    @property
    def holds(self) -> bool:
        """Whether the group can be stored."""
        return not self.reason
