"""What pruning decides: for every shared-input group one permutation, for every linear a mask."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permllm_offline.model.layout import GroupLayout
from permllm_offline.sparsity.importance import Scores, not_finite, row_chunks
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.packing import pack_mask, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical


@dataclass(frozen=True)
class GroupDecision:
    """Decision for one shared-input group; its tensors are on the CPU.

    ``permutation`` is block-local uint8 [in_features] (int64 across blocks) in canonical form, or
    None. ``masks`` holds each linear's kept set in the *original* channel order, packed to bits:
    uint8 [out, in/8].
    ``retained`` is the share of the importance that each mask keeps, 0..1.
    """

    layout: GroupLayout
    permutation: Tensor | None
    masks: Mapping[str, Tensor]
    retained: Mapping[str, float]

    def mask(self, linear: str) -> Tensor:
        """Kept set of one linear, bool [out_features, in_features], original channel order."""
        return unpack_mask(self.masks[linear])


LayerDecision = Sequence[GroupDecision]


def without_masks(decision: LayerDecision) -> LayerDecision:
    """The decision of a decoder layer whose masks are kept elsewhere."""
    return [replace(group, masks={}) for group in decision]


def decide(
    layout: GroupLayout,
    importances: Mapping[str, Scores],
    permutation: Tensor | None,
    pattern: Pattern,
) -> GroupDecision:
    """Turn importances and a permutation of one group into masks, some rows at a time.

    Args:
        layout: of the group.
        importances: linear -> float32 [out_features, in_features], original channel order, on any
            device.
        permutation: block-local uint8 [in_features], or None.
        pattern: N and M.

    Raises:
        OfflineError: an importance is NaN or infinite.
    """
    if permutation is not None:
        permutation = canonical(permutation, layout.block_size, pattern).cpu()
    masks, retained = {}, {}
    for linear, importance in importances.items():
        packed, sums = [], RetainedSums()
        for rows in row_chunks(importance.shape):
            part = importance[rows]
            mask = choose_mask(part, pattern, permutation, layout.block_size)
            packed.append(pack_mask(mask).cpu())
            sums.add(part, mask)
        masks[linear], retained[linear] = torch.cat(packed), sums.share
        if not math.isfinite(retained[linear]):
            raise not_finite(linear)
    return GroupDecision(layout, permutation, masks, retained)


class RetainedSums:
    """The share of the importance of a matrix that its mask keeps, from parts of its rows.

    Each row is added up in float64 on its own, so that neither parts nor threads change a bit.
    """

    def __init__(self) -> None:
        self._totals: list[Tensor] = []
        self._kept: list[Tensor] = []

    def add(self, importance: Tensor, mask: Tensor) -> None:
        """Count further rows: floating [rows, in_features], bool [rows, in_features]."""
        precise = importance.double()
        self._totals.append(precise.sum(1))
        self._kept.append(precise.masked_fill_(~mask, 0).sum(1))

    @property
    def share(self) -> float:
        """Of all rows: 0..1, 0 where nothing is important, NaN where something is not finite."""
        total = torch.cat(self._totals).sum()
        share = torch.cat(self._kept).sum() / total.clamp_min(1e-300)
        return float(share) if total.isfinite() else math.nan
