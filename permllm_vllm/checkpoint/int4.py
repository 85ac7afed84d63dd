"""int4 values: -8 to 7 times a small multiplier that a row has for 64 successive input channels.

The products are int8, and all that computes with them sees those; here is how a checkpoint holds
them in 4 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem

GROUP = 64
"""Input channels that have a multiplier together; permutations must not move any out of them."""
KEPT = GROUP // 2
"""Kept values of a group: every pattern keeps half of the channels."""
SMALLEST, LARGEST = -8, 7
MOST = 16
"""Largest multiplier: SMALLEST times as much is the smallest int8."""


def pack_int4(values: Tensor, multipliers: Tensor) -> Tensor:
    """Divide values by their multipliers, and put two into a byte, the first into its lower half.

    int8 [out, n] of an even n, uint8 [out, ceil(n / KEPT)] -> uint8 [out, n / 2]. Each half is the
    quotient plus 8. The values must be -8 to 7 times the multipliers, which are 1 to 16.
    """
    quotients = _grouped(values) // multipliers.view(torch.int8)[..., None]
    halves = (quotients.flatten(-2)[..., : values.shape[-1]] - SMALLEST).view(torch.uint8)
    return halves[..., 0::2] | halves[..., 1::2] << 4


def unpack_int4(packed: Tensor, multipliers: Tensor) -> Tensor:
    """Undo `pack_int4`: uint8 [..., n / 2] and [..., ceil(n / KEPT)] -> int8 [..., n]."""
    halves = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).view(torch.int8)
    values = _grouped(halves.add_(SMALLEST)) * multipliers.view(torch.int8)[..., None]
    return values.flatten(-2)[..., : 2 * packed.shape[-1]].contiguous()


def stored_values(packed: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return the values of a layer from the tensors that hold them, int4 values as int8."""
    return packed if multipliers is None else unpack_int4(packed, multipliers)


def multiplier_problems(name: str, multipliers: Tensor) -> list[Problem]:
    """List the rule that the multipliers of a layer break, if any: 1 to 16."""
    wrong = (multipliers < 1) | (multipliers > MOST)
    if not bool(wrong.any()):
        return []
    return [Problem(name, f"{int(multipliers[wrong][0])}", f"1 to {MOST}", FETCH_AGAIN)]


def _grouped(rows: Tensor) -> Tensor:
    """[..., n] -> [..., groups, KEPT], zeros past the last value."""
    return functional.pad(rows, (0, -rows.shape[-1] % KEPT)).unflatten(-1, (-1, KEPT))
