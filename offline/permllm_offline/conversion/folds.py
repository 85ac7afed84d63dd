"""Whether a permutation that was found can be folded, and a layout that keeps it at run time."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from permllm_offline.model.families import Fold
from permllm_offline.model.layout import GroupLayout


def agrees(layout: GroupLayout, permutation: Tensor) -> bool:
    """Whether blocks that one value head feeds have equal permutations: block-local uint8 [in]."""
    blocks, ties = permutation.reshape(-1, layout.block_size), layout.ties()
    return all(bool((blocks[ties == tie] == blocks[ties == tie][0]).all()) for tie in ties.unique())


def at_run_time(layout: GroupLayout) -> GroupLayout:
    """Return the same group, its permutation applied at run time."""
    return replace(layout, group=replace(layout.group, fold=Fold.NONE, fold_into=()))
