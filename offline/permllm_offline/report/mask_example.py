"""The kept weights of a corner of one linear, without and with its permutation, to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass

from torch import Tensor

from permllm_offline.model.layout import GroupLayout
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.sparsity.importance import Scores
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern

SIZE = 64
"""Rows and channels of the corner, where the linear is not smaller."""


@dataclass(frozen=True)
class MaskExample:
    """First rows and channels of a linear in the original order, a string of 0 and 1 per row.

    ``unpermuted`` is the mask that the importance alone would choose, ``pruned`` the one chosen
    after the channels were permuted.
    """

    name: str
    unpermuted: Sequence[str]
    pruned: Sequence[str]


def example_layer(layers: Sequence[Sized]) -> int:
    """Number of the decoder layer that is shown, from the middle of those with pruned groups."""
    some = [index for index, groups in enumerate(layers) if len(groups)]
    return some[len(some) // 2]


def unpermuted_corner(
    layout: GroupLayout, importances: Mapping[str, Scores], pattern: Pattern
) -> list[str]:
    """Corner of the mask that the first linear of a group would have without a permutation."""
    importance = importances[layout.group.linears[0]][:SIZE]
    return corner(choose_mask(importance, pattern, None, layout.block_size))


def mask_example(
    name: Callable[[str], str], decision: LayerDecision, unpermuted: Sequence[str]
) -> MaskExample | None:
    """Example of the first linear of a finished decoder layer, or None if it is not permuted.

    ``name`` gives what the checkpoint calls a part of that layer.
    """
    group = decision[0]
    if group.permutation is None:
        return None
    linear = group.layout.group.linears[0]
    return MaskExample(name(linear), unpermuted, corner(group.mask(linear)))


def corner(mask: Tensor) -> list[str]:
    """First rows and channels of bool [out_features, in_features] as strings of 0 and 1."""
    return ["".join(str(int(kept)) for kept in row) for row in mask[:SIZE, :SIZE].tolist()]
