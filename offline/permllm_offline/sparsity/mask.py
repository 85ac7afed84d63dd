"""N:M masks: keep the N most important of every M consecutive input channels of a row."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import permute_columns, unpermute_columns

MOST_COMPARED = 16
"""Channels of a group at most of which every two are compared: beyond, a search is faster."""


def keep_channels(importance: Tensor, pattern: Pattern) -> Tensor:
    """Keep N of every M consecutive channels of a transposed importance; low index wins a tie.

    Channels are rows here so that every comparison runs over contiguous memory. In small groups the
    rank of a channel comes from the M(M-1)/2 comparisons instead of from a search.

    Args:
        importance: [in_features, out_features], finite, in permuted channel order.
        pattern: N and M; M divides in_features.

    Returns:
        bool [in_features, out_features], exactly N set in every group.
    """
    kept, size = pattern
    if size > MOST_COMPARED:
        return _keep_above_threshold(importance, pattern)
    members = importance.unflatten(0, (-1, size)).unbind(1)
    wins = torch.zeros((size, *members[0].shape), dtype=torch.int8, device=importance.device)
    for first in range(size):
        for second in range(first + 1, size):
            first_wins = members[first] >= members[second]
            wins[first] += first_wins
            wins[second] += ~first_wins
    return (wins >= size - kept).transpose(0, 1).reshape(importance.shape)


def _keep_above_threshold(importance: Tensor, pattern: Pattern) -> Tensor:
    """The same by the least importance that is kept, which is searched for in each group."""
    groups = importance.unflatten(0, (-1, pattern.group))
    best = groups.transpose(1, 2).contiguous().topk(pattern.kept, dim=2, sorted=False).values
    threshold = best.amin(2).unsqueeze(1)
    above, level = groups > threshold, groups == threshold
    places = pattern.kept - above.sum(1, keepdim=True, dtype=torch.int16)
    kept = above | (level & (level.cumsum(1, dtype=torch.int16) <= places))
    return kept.reshape(importance.shape)


def pack_channels(mask: Tensor) -> Tensor:
    """Pack a transposed mask, eight input channels in a byte, the first one lowest.

    The checkpoint's ``pack_mask`` for masks whose channels are rows: no transpose in between.

    uint8 [in_features, out_features] of 0 and 1 -> uint8 [in_features / 8, out_features].
    """
    first, *others = mask.unflatten(0, (-1, 8)).unbind(1)
    packed = first.clone()
    for bit, channel in enumerate(others, 1):
        packed |= channel << bit
    return packed


def unpack_channels(packed: Tensor) -> Tensor:
    """Undo ``pack_channels``: uint8 [packed, out_features] -> [8 x packed, out_features]."""
    channels = torch.empty(
        (len(packed), 8, packed.shape[1]), dtype=torch.uint8, device=packed.device
    )
    for bit in range(8):
        torch.bitwise_and(packed >> bit, 1, out=channels[:, bit])
    return channels.flatten(0, 1)


def choose_mask(
    importance: Tensor, pattern: Pattern, permutation: Tensor | None, block_size: int
) -> Tensor:
    """Choose the kept weights of a linear layer, in the original channel order.

    Args:
        importance: [out_features, in_features] in the original channel order.
        pattern: N and M; groups are formed in the permuted order.
        permutation: block-local uint8 [in_features], or None for the original order.
        block_size: channels per block of ``permutation``.

    Returns:
        bool [out_features, in_features].
    """
    if permutation is None:
        return keep_channels(importance.t().contiguous(), pattern).t().contiguous()
    permuted = permute_columns(importance, permutation, block_size)
    mask = keep_channels(permuted.t().contiguous(), pattern).t().contiguous()
    return unpermute_columns(mask, permutation, block_size)
