"""Refine a channel reallocation by linear sum assignment (the second step of RIA's permutation).

A group without one of its channels still keeps something in every row; which channel adds most to
which group is an assignment problem. Solving it for each place of the groups in turn never lowers
the importance that is kept.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from permllm_offline.model.layout import GroupLayout
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.sparsity.importance import Scores, not_finite
from permllm_vllm.checkpoint.pattern import Pattern

SWEEPS = 3
"""Rounds over the places of a group at most; the first moves most channels."""

CHUNK_ELEMENTS = 1 << 24
"""Elements of the [rows, groups, groups] comparison that are in memory at once."""


def assign_group(
    layout: GroupLayout, importances: Mapping[str, Scores], pattern: Pattern
) -> Tensor:
    """Allocate the channels of a shared-input group heuristically, then refine.

    Args:
        layout: of the group.
        importances: linear -> [out_features, in_features], original channel order.
        pattern: N and M.

    Returns:
        int64 [independent permutations, block_size] on the CPU: position -> channel.

    Raises:
        OfflineError: an importance is NaN or infinite, which no assignment can be made of.
    """
    order = allocate_group(layout, importances, pattern)
    size, ties = layout.block_size, layout.ties()

    def rows(block: int) -> Tensor:
        columns = slice(block * size, (block + 1) * size)
        parts = {linear: importance[:, columns] for linear, importance in importances.items()}
        for linear, part in parts.items():
            if not part.isfinite().all():
                raise not_finite(linear)
        return torch.cat(list(parts.values()))

    for independent in range(len(order)):
        # Rows of tied blocks are further rows of the one permutation that they share.
        tied = (ties == independent).nonzero().flatten().tolist()
        stacked = torch.stack([rows(block) for block in tied], 1).flatten(0, 1)
        order[independent] = refine(stacked, order[independent], pattern)
    return order


def refine(importance: Tensor, order: Tensor, pattern: Pattern, sweeps: int = SWEEPS) -> Tensor:
    """Move channels between the groups of one block until no assignment keeps more.

    Args:
        importance: [rows, block_size], original channel order.
        order: int64 [block_size], position -> channel, where to start.
        pattern: N and M; M divides block_size.
        sweeps: over the M places of a group at most.

    Returns:
        int64 [block_size], position -> channel; it keeps at least as much importance.
    """
    channels = importance.t().contiguous()
    groups = order.reshape(-1, pattern.group).clone()
    for _ in range(sweeps):
        moved = False
        for place in range(pattern.group):
            others = [position for position in range(pattern.group) if position != place]
            gains = assignment_gains(channels, groups[:, place], groups[:, others], pattern)
            chosen = torch.from_numpy(linear_sum_assignment(gains.numpy(), maximize=True)[1])
            stay = gains.diagonal().sum()
            # Rounding alone must not move channels: equal gains keep their place.
            if gains[torch.arange(len(gains)), chosen].sum() > stay * (1 + 1e-6):
                groups[:, place] = groups[chosen, place]
                moved = True
        if not moved:
            break
    return groups.flatten()


def assignment_gains(
    channels: Tensor, candidates: Tensor, others: Tensor, pattern: Pattern
) -> Tensor:
    """What each group gains in kept importance from each candidate channel.

    A row of a group keeps its N best of the M - 1 others; a candidate that exceeds the least of
    them adds the difference.

    Args:
        channels: [block_size, rows], importance.
        candidates: int64 [groups].
        others: int64 [groups, M - 1].
        pattern: N and M.

    Returns:
        float64 [groups, candidates] on the CPU.
    """
    threshold = channels[others].topk(pattern.kept, dim=1).values[:, -1]
    candidate = channels[candidates]
    gains = torch.zeros((len(others), len(others)), dtype=torch.float64)
    chunk = max(1, CHUNK_ELEMENTS // gains.numel())
    for limit, value in zip(threshold.split(chunk, 1), candidate.split(chunk, 1), strict=True):
        gains += (value.unsqueeze(0) - limit.unsqueeze(1)).clamp_min_(0).sum(2).cpu()
    return gains
