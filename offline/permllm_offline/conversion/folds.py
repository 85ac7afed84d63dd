"""Whether a permutation that was found can be folded."""

from __future__ import annotations

from torch import Tensor

from permllm_offline.model.layout import GroupLayout


def agrees(layout: GroupLayout, permutation: Tensor) -> bool:
    """Whether blocks that one value head feeds have equal permutations: block-local uint8 [in]."""
    blocks, ties = permutation.reshape(-1, layout.block_size), layout.ties()
    return all(bool((blocks[ties == tie] == blocks[ties == tie][0]).all()) for tie in ties.unique())
