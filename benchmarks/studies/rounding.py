"""Group-wise int4 as weights that are rounded and kept in floating point, for accuracy alone."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

LARGEST_INT4, LARGEST_INT8 = 7, 127


def rounded(weight: Tensor, order: Tensor, group: int, largest: int = LARGEST_INT4) -> Tensor:
    """Round each row on grids of its own, one for each group of input channels.

    The step of a grid is the largest magnitude of the group over ``largest``; zeros stay zero.
    Where ``group`` does not divide the channels, the last group is smaller.

    Args:
        weight: floating [out_features, in_features], original channel order.
        order: int64 [in_features], position -> channel: groups are formed in this order.
        group: channels of a group.
        largest: integer of the grid's end.

    Returns:
        The same shape, dtype and channel order.
    """
    channels = weight.shape[1]
    permuted = functional.pad(weight[:, order].float(), (0, -channels % group))
    grouped = permuted.unflatten(1, (-1, group))
    step = grouped.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    nearest = (grouped / step).round_().mul_(step).flatten(1)[:, :channels]
    return nearest[:, order.argsort()].to(weight.dtype)


def by_range(channel_range: Tensor, unit: int, block_size: int) -> Tensor:
    """Order runs of channels inside each block by the largest range in the run.

    Args:
        channel_range: [channels], in the order of the positions that are sorted.
        unit: channels of a run, which stay together: 1, or those of an N:M group.
        block_size: channels of a block, a multiple of ``unit``; all of them for one block.

    Returns:
        int64 [channels], new position -> old position.
    """
    runs = channel_range.reshape(-1, block_size // unit, unit).amax(-1)
    order = runs.argsort(dim=1, stable=True)
    starts = torch.arange(len(runs))[:, None] * (block_size // unit)
    first = (order + starts).flatten()[:, None] * unit
    return (first + torch.arange(unit)).flatten()
