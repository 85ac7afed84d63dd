"""Find the groups of channels in which a pruned weight obeys N:M, from its zeros alone.

Write a row of a kept set as +1 (kept) and -1 (pruned). All patterns keep half of a group, so the
indicator vector of a group is orthogonal to every such row: the groups lie in the null space of
the matrix of all rows. With a few more rows than channels nothing else does, and the projector
onto that space is 1 / M inside a group and 0 outside. What is found is then verified on every row,
so a wrong guess is never returned; where the rows leave several answers, each stores the same
weights, and one is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor

from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical, permute_columns

_NULL = 1e-4
"""Eigenvalues of a Gram matrix of +-1 rows below this are 0: others are 1 / channels or more."""
_LINKED = 1e-6
_MOST_TRIALS = 20_000


def obeys(kept: Tensor, pattern: Pattern, permutation: Tensor | None, block_size: int) -> bool:
    """Whether no group of a kept set `[rows, in]` keeps more than N, in permuted order."""
    if kept.shape[1] % pattern.group:
        return False
    if permutation is not None:
        kept = permute_columns(kept, permutation, block_size)
    counts = kept.unflatten(1, (-1, pattern.group)).sum(dim=2, dtype=torch.int8)
    return bool((counts <= pattern.kept).all())


def recover_permutation(
    kept: Tensor, pattern: Pattern, block_size: int, ties: Tensor | None = None
) -> Tensor | None:
    """Find a block-wise permutation after which a kept set obeys the pattern.

    Args:
        kept: bool [rows, in], the rows of all linears that share the permutation.
        pattern: N and M.
        block_size: channels per block; it must divide `in`.
        ties: int64 [in / block_size], blocks of equal number get the same permutation.

    Returns:
        block-local uint8 [in] in canonical form, verified on every row; None where there is none,
        or the rows leave too many possibilities to try.
    """
    blocks = kept.unflatten(1, (-1, block_size)).transpose(0, 1)
    if ties is None:
        ties = torch.arange(len(blocks))
    found: dict[int, Tensor] = {}
    for tie in ties.unique().tolist():
        order = recover_block(blocks[ties == tie].flatten(0, 1), pattern)
        if order is None:
            return None
        found[tie] = order
    local = torch.cat([found[tie] for tie in ties.tolist()]).to(torch.uint8)
    permutation = canonical(local, block_size, pattern)
    return permutation if obeys(kept, pattern, permutation, block_size) else None


def recover_block(kept: Tensor, pattern: Pattern) -> Tensor | None:
    """Find an order of the channels of one block: bool [rows, channels] -> int64 [channels]."""
    most = kept.shape[1] * pattern.kept // pattern.group
    if bool((kept.sum(dim=1) > most).any()):
        return None
    rows = kept[kept.sum(dim=1) == most]  # an accidental zero in a row would hide its groups
    groups: list[list[int]] = []
    small: list[list[int]] = []
    for part in linked_channels(rows):
        size = len(part.channels)
        if part.freedom * pattern.group < size:
            return None  # fewer than one null vector for each of its groups
        if size < pattern.group:
            small.append(part.channels)
            continue
        split = _split(part.channels, rows, pattern, iter(range(_MOST_TRIALS)))
        if split is None:
            return None
        groups += split
    merged = _merge(small, pattern.group)
    if merged is None:
        return None
    order = torch.tensor([channel for group in groups + merged for channel in group])
    return order if obeys(kept[:, order], pattern, None, 0) else None


class Part(NamedTuple):
    """Channels of which every row keeps half, and the dimension of the null space there."""

    channels: list[int]
    freedom: int


def linked_channels(rows: Tensor) -> list[Part]:
    """Split channels into the finest parts of which every row keeps exactly half.

    bool [rows, channels] -> the parts. Channels that the rows do not tell apart stay together.
    """
    signs = rows.double() * 2 - 1
    values, vectors = torch.linalg.eigh(signs.T @ signs)
    null = vectors[:, values < _NULL]
    projector = null @ null.T
    linked = projector.abs() > _LINKED
    parts, left = [], list(range(rows.shape[1]))
    while left:
        inside, reached = torch.zeros_like(linked[0]), linked[left[0]].clone()
        reached[left[0]] = True
        while not torch.equal(inside, reached):
            inside = reached
            reached = inside | linked[inside].any(dim=0)
        freedom = round(float(projector.diagonal()[inside].sum()))
        parts.append(Part(inside.nonzero().flatten().tolist(), freedom))
        left = [channel for channel in left if not inside[channel]]
    return parts


def _split(
    channels: list[int], rows: Tensor, pattern: Pattern, trials: Iterator[int]
) -> list[list[int]] | None:
    """Search groups among channels that the rows do not separate; None when trials run out."""
    if not channels:
        return []
    first, others = channels[0], channels[1:]
    for rest in combinations(others, pattern.group - 1):
        if next(trials, None) is None:
            return None
        group = [first, *rest]
        if not bool((rows[:, group].sum(dim=1) == pattern.kept).all()):
            continue
        left = [channel for channel in others if channel not in rest]
        split = _split(left, rows, pattern, trials)
        if split is not None:
            return [group, *split]
    return None


def _merge(parts: list[list[int]], size: int) -> list[list[int]] | None:
    """Join parts to groups: each keeps half of its channels in every row, so any union does."""
    groups: list[list[int]] = []
    for part in sorted(parts, key=len, reverse=True):
        room = (g for g in groups if len(g) + len(part) <= size)
        group = next(room, None)
        if group is None:
            groups.append(list(part))
        else:
            group += part
    return groups if all(len(group) == size for group in groups) else None
