"""compressed-tensors `marlin-24`: 2:4 in integers of 4 or 8 bits, as Sparse-Marlin multiplied them.

Its engines and its tools have dropped it, and none ever unpacked it. For a linear `L` of `out` rows
and `in` channels, whose weight is an integer times a scale of its row or of a group of channels:

- `L.weight_packed` int32 [in / 32, 16 * out / integers in one]: the kept integers, without sign, in
  the order in which 32 threads multiply tiles of 16 kept inputs by 64 rows;
- `L.meta` int16 [in / 32, 2 * out]: two places of two bits for every group of 4 channels, in the
  order of CUTLASS's sparse GEMM for sm_80;
- `L.scale_packed` float16 [1 or in / group, out].
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from permllm_vllm.checkpoint.packed_integers import unpack_integers

_LANES, _TILE_INPUTS, TILE_ROWS = 32, 16, 64
_INTERLEAVED = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
"""Which of the integers that a thread reads together lies in each place of an int32, by bits."""
_SCALES_INTERLEAVED = (0, 4, 1, 5, 2, 6, 3, 7)
"""The same of the scales of eight rows, where they belong to groups of channels."""


@cache
def integer_order(bits: int) -> Tensor:
    """Return where the integers of a tile come from: int64 [1024], `input * 64 + row` of each.

    A thread holds, for the fragments of two products (m16n8k16), four columns of each.
    """
    lane = torch.arange(_LANES).view(-1, 1, 1, 1)
    column, half, pair = (torch.arange(n) for n in (4, 2, 4))
    inputs = 2 * (lane % 4) + pair % 2 + 8 * (pair // 2)
    rows = 16 * (lane // 8) + 8 * (lane // 4 % 2) + 4 * half.view(-1, 1) + column.view(-1, 1, 1)
    together = _INTERLEAVED[bits]
    return (inputs * TILE_ROWS + rows).reshape(-1, len(together))[:, list(together)].flatten()


def unpack_tiles(packed: Tensor, bits: int) -> Tensor:
    """Undo the tiles of `weight_packed`: int32 [in / 32, out * 16 / n] -> int8 [out, in / 2]."""
    tiles = packed.shape[0]
    held = unpack_integers(packed, bits).view(tiles, -1, _TILE_INPUTS * TILE_ROWS)
    rows = held[..., integer_order(bits).argsort()].view(tiles, -1, _TILE_INPUTS, TILE_ROWS)
    return rows.permute(1, 3, 0, 2).reshape(-1, tiles * _TILE_INPUTS)


def unpack_places(meta: Tensor) -> Tensor:
    """Undo the order of `meta`: int16 [in / 32, 2 * out] -> uint8 [out, in / 2], each 0 to 3."""
    rows, columns = meta.shape[1] // 2, meta.shape[0] * 2
    row, column = torch.arange(rows).view(-1, 1), torch.arange(columns)
    # Rows are spread over 64, then the 2 x 2 blocks of words are transposed.
    to_row = row // 64 * 64 + row % 4 // 2 * 32 + row % 64 // 8 * 4 + row % 2 * 2 + row % 8 // 4
    moved = (column % 2) - (to_row % 2)
    to_row, to_column = to_row + moved, column - moved
    at = (to_column // 2 * rows + to_row) * 2 + to_column % 2
    held = meta.flatten()[at].view(torch.uint8)
    return torch.stack([held >> shift & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(1)


def mask_of(places: Tensor) -> Tensor:
    """Return which channels two places of every group of 4 name: bool [out, in]."""
    first, second = places[:, ::2], places[:, 1::2]
    return torch.stack([(first == at) | (second == at) for at in range(4)], dim=-1).flatten(1)


def unpack_scales(packed: Tensor, in_features: int) -> Tensor:
    """Undo the order of `scale_packed`: [groups, out] -> [out, groups].

    compressed-tensors orders them as those of whole rows where a group has half of the channels or
    more, however many groups there are.
    """
    groups = packed.shape[0]
    if groups == 1 or in_features // groups >= in_features // 2:
        return packed.t().contiguous()
    scales = torch.empty_like(packed).view(groups, -1, 8)
    scales[..., list(_SCALES_INTERLEAVED)] = packed.view(scales.shape)
    return scales.view(packed.shape).t().contiguous()
