"""What pruning decides: for every shared-input group one permutation, for every linear a mask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.mask import choose_mask
from permllm_offline.model.layout import GroupLayout
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
    importances: Mapping[str, Tensor],
    permutation: Tensor | None,
    pattern: Pattern,
) -> GroupDecision:
    """Turn importances and a permutation of one group into masks.

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
        if not importance.isfinite().all():
            raise OfflineError(
                f"the importance of {linear} is not finite: the model's weights or its activations "
                "overflow. Try --dtype float32, and check the model with `permllm-offline eval`."
            )
        mask = choose_mask(importance, pattern, permutation, layout.block_size)
        total = importance.double().sum().clamp_min(1e-300)
        retained[linear] = float(importance[mask].double().sum() / total)
        masks[linear] = pack_mask(mask).cpu()
    return GroupDecision(layout, permutation, masks, retained)
