"""Pack a masked weight into kept values and a bit mask, and back.

Everything here is in permuted channel order: the caller has permuted the columns already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import MASK_BYTE, Pattern

_COUNTED_ROWS = 256


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a mask into bits, channel `j` in bit `j % 8` (least significant first) of byte `j // 8`.

    bool [out, in] -> uint8 [out, in / 8]. Raises `CheckpointError` when `in` is no multiple of 8.
    """
    if mask.dtype != torch.bool or mask.dim() != 2 or mask.shape[1] % 8:
        raise CheckpointError(
            f"mask is {mask.dtype} {tuple(mask.shape)}; rule: bool [out, in] with in a multiple "
            "of 8; remedy: leave this layer dense (list it in `ignore`)"
        )
    bits = mask.contiguous().view(torch.uint8).unflatten(1, (-1, 8))
    packed = bits[..., 0].clone(memory_format=torch.contiguous_format)
    for bit in range(1, 8):
        packed |= bits[..., bit] << bit
    return packed


def unpack_mask(packed: Tensor) -> Tensor:
    """Undo `pack_mask`: uint8 [out, in / 8] -> bool [out, in]."""
    if packed.dtype != torch.uint8 or packed.dim() != 2:
        raise CheckpointError(
            f"packed mask is {packed.dtype} {tuple(packed.shape)}; rule: uint8 [out, in / 8]; "
            "remedy: write the checkpoint again"
        )
    bits = torch.empty((*packed.shape, 8), dtype=torch.uint8, device=packed.device)
    for bit in range(8):
        bits[..., bit] = (packed >> bit) & 1
    return bits.view(torch.bool).flatten(1)


def pack_values(weight: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Collect the kept values of every row, group by group, in ascending channel.

    [out, in], bool [out, in] -> [out, in * kept / group], same dtype, bit for bit (a kept zero and
    its sign stay). Raises `CheckpointError` when shapes differ or a group keeps another number.
    """
    if weight.shape != mask.shape:
        raise CheckpointError(
            f"weight is {tuple(weight.shape)} and mask {tuple(mask.shape)}; rule: equal shapes; "
            "remedy: build the mask from this weight"
        )
    violation = first_violation(pack_mask(mask), pattern)
    if violation is not None:
        row, group, count = violation
        raise CheckpointError(
            f"mask keeps {count} weights in row {row}, group {group}; rule: exactly "
            f"{pattern.kept} of {pattern.group}; remedy: keep explicit zeros where fewer are wanted"
        )
    return weight[mask].view(weight.shape[0], -1)


def unpack(values: Tensor, packed_mask: Tensor) -> Tensor:
    """Put the kept values back in place, zeros elsewhere.

    [out, in * kept / group], uint8 [out, in / 8] -> [out, in] in permuted order, dtype of `values`.
    Raises `CheckpointError` when the mask of a row keeps another number of values than the row has.
    """
    mask = unpack_mask(packed_mask)
    if values.dim() != 2 or values.shape[0] != mask.shape[0]:
        raise CheckpointError(
            f"values are {tuple(values.shape)} and the mask has {mask.shape[0]} rows; rule: one "
            "row of values for each row of the mask; remedy: write the checkpoint again"
        )
    counts = [rows.sum(dim=1) for rows in mask.split(_COUNTED_ROWS)]  # which widens the rows
    wrong = (torch.cat(counts) != values.shape[1]).nonzero()
    if len(wrong):
        row = int(wrong[0])
        raise CheckpointError(
            f"mask of row {row} keeps {int(mask[row].sum())} weights and {values.shape[1]} values "
            "are stored; rule: the two agree; remedy: fetch or write the checkpoint again"
        )
    dense = torch.zeros(mask.shape, dtype=values.dtype, device=values.device)
    return dense.masked_scatter_(mask, values)


def count_violations(packed_mask: Tensor, pattern: Pattern) -> int:
    """Count the groups of a packed mask that do not keep exactly `pattern.kept` weights.

    Raises `CheckpointError` where a row ends inside a group.
    """
    return int((_kept_by_group(packed_mask, pattern) != pattern.kept).sum())


def first_violation(packed_mask: Tensor, pattern: Pattern) -> tuple[int, int, int] | None:
    """Find the first group that does not keep `pattern.kept`: (row, group in the row, kept)."""
    counts = _kept_by_group(packed_mask, pattern)
    wrong = (counts != pattern.kept).any(dim=1)
    if not wrong.any():
        return None
    row = int(wrong.nonzero()[0])
    group = int((counts[row] != pattern.kept).nonzero()[0])
    return row, group, int(counts[row, group])


def _kept_by_group(packed_mask: Tensor, pattern: Pattern) -> Tensor:
    """Count the bits of every group: uint8 [out, in / 8] -> uint8 [out, in / group]."""
    rows, octets = packed_mask.shape
    if octets * MASK_BYTE % pattern.group:
        raise CheckpointError(
            f"mask has {octets * MASK_BYTE} channels; rule: whole groups of {pattern.group}, since "
            f"the pattern is {pattern}; remedy: leave this layer dense (list it in `ignore`), or "
            "use a pattern of smaller groups"
        )
    # Neighbouring fields of 1, then 2 bits are added within each byte, up to the width of a group.
    counts = packed_mask - ((packed_mask >> 1) & 0x55)
    counts = (counts & 0x33) + ((counts >> 2) & 0x33)
    if pattern.group < MASK_BYTE:
        return torch.stack([counts & 0xF, counts >> 4], dim=2).flatten(1)
    counts = (counts + (counts >> 4)) & 0xF
    return counts.view(rows, -1, pattern.group // MASK_BYTE).sum(dim=2, dtype=torch.uint8)
