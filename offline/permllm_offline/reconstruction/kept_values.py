"""Take the kept weights out of a matrix, and put them back.

Every row of a mask keeps half of its channels, wherever a permutation leaves them; their numbers
are found once, and take a byte for each weight of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.int4_values import Int4Grid
from permllm_vllm.checkpoint.int4 import GROUP
from permllm_vllm.checkpoint.packing import unpack_mask

CHANNEL_BYTES = 2
"""Of the number of a kept channel: rows are shorter than 32768 in all but the largest models."""


def kept_channels(mask: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Numbers of the channels that each row keeps, ascending: integers [out_features, kept].

    Args:
        mask: packed bits, uint8 [out_features, in_features / 8]; all rows keep as many.
        device: of the result.
    """
    kept = int(unpack_mask(mask[:1]).sum())
    dtype = torch.int16 if mask.shape[1] * 8 <= 1 << 15 else torch.int32
    channels = torch.zeros((len(mask), kept), dtype=dtype, device=device)
    for rows in row_chunks(torch.Size((len(mask), mask.shape[1] * 8))):
        places = unpack_mask(mask[rows]).nonzero()[:, 1]
        channels[rows] = places.view(-1, kept).to(channels)
    return channels


def gather_kept(weight: Tensor, channels: Tensor, kept: Tensor) -> None:
    """Copy the kept weights of every row into ``kept``.

    Args:
        weight: [out_features, in_features].
        channels: of ``kept_channels``.
        kept: [out_features, kept], any dtype and device.
    """
    for rows, values in _kept_rows(weight, channels):
        kept[rows] = values


def add_kept(weight: Tensor, channels: Tensor, kept: Tensor) -> None:
    """Add what ``gather_kept`` copies; arguments are the same."""
    for rows, values in _kept_rows(weight, channels):
        kept[rows] += values.to(kept)


def scatter_kept(
    kept: Tensor, channels: Tensor, weight: Tensor, grid: Int4Grid | None = None
) -> None:
    """Put kept weights back in their places of ``weight``; the others stay as they are.

    Args:
        kept: [out_features, kept], any dtype and device.
        channels: of ``kept_channels``.
        weight: [out_features, in_features].
        grid: of the weight, to whose nearest values they are rounded; half of every group is kept.
    """
    if grid is not None:
        grid = replace(grid, group=GROUP * kept.shape[1] // weight.shape[1])
    for rows in row_chunks(weight.shape):
        places, values = channels[rows].to(weight.device, torch.int64), kept[rows]
        if grid is not None:
            values = grid.rounded(values, rows=rows, columns=places)
        weight[rows].scatter_(1, places, values.to(weight))


def _kept_rows(weight: Tensor, channels: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows after the other, with their kept weights: [rows, kept]."""
    for rows in row_chunks(weight.shape):
        yield rows, weight[rows].gather(1, channels[rows].to(weight.device, torch.int64))
