"""The heuristic channel reallocation of RIA, inside each block (the "CP" of the paper)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from permllm_offline.model.layout import GroupLayout
from permllm_offline.sparsity.importance import Scores, column_sums
from permllm_vllm.checkpoint.pattern import Pattern


def allocate_channels(channel_importance: Tensor, pattern: Pattern) -> Tensor:
    """Deal the channels of each block over its groups so that important ones do not meet.

    Channels are sorted by importance and dealt like cards, one to each group, then one to each
    group in the opposite direction, and so on (Section 4.2 of the RIA paper, ICLR 2024, which
    does this over all channels of a layer).

    Args:
        channel_importance: [blocks, block_size], the sum of each input channel's importance over
            all rows of all linears that share the permutation.
        pattern: N and M; M divides block_size.

    Returns:
        int64 [blocks, block_size]: position -> channel, both within the block.
    """
    blocks, block_size = channel_importance.shape
    groups = block_size // pattern.group
    ranked = channel_importance.argsort(dim=1, descending=True, stable=True)
    rounds = ranked.reshape(blocks, pattern.group, groups).clone()
    rounds[:, 1::2] = rounds[:, 1::2].flip(2)
    return rounds.transpose(1, 2).reshape(blocks, block_size)


def allocate_group(
    layout: GroupLayout, importances: Mapping[str, Scores], pattern: Pattern
) -> Tensor:
    """Allocate the channels of a shared-input group by the importance summed over its linears.

    Args:
        layout: of the group.
        importances: linear -> [out_features, in_features], original channel order.
        pattern: N and M.

    Returns:
        int64 [independent permutations, block_size] on the CPU: position -> channel.
    """
    channels = torch.stack([column_sums(importance) for importance in importances.values()]).sum(0)
    blocks = block_importance(channels.cpu(), layout.ties(), layout.block_size)
    return allocate_channels(blocks, pattern)


def block_importance(channel_importance: Tensor, ties: Tensor, block_size: int) -> Tensor:
    """Sum the importance of tied blocks.

    Args:
        channel_importance: [in_features].
        ties: int64 [blocks], the independent permutation that each block uses.
        block_size: channels per block.

    Returns:
        [independent permutations, block_size].
    """
    blocks = channel_importance.reshape(-1, block_size)
    independent = int(ties.max()) + 1
    total = torch.zeros((independent, block_size), dtype=blocks.dtype, device=blocks.device)
    return total.index_add_(0, ties.to(blocks.device), blocks)
