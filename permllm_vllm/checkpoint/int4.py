"""int4 values: -8 to 7 times a small multiplier that a row has for 64 successive input channels.

The products are int8, and all that computes with them sees those; here is how a checkpoint holds
them in 4 bits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem

GROUP = 64
"""Successive permuted channels that have a multiplier together."""
KEPT = GROUP // 2
"""Kept values of a group: every pattern keeps half of the channels."""
SMALLEST, LARGEST = -8, 7
MOST = 16
"""Largest multiplier: SMALLEST times as much is the smallest int8."""


def channels_of_multiplier(share: int, inputs: int) -> int:
    """Return how many channels have a multiplier together in a share of a layer's inputs.

    Fewer than GROUP where shares of whole mask bytes would cut groups: then multipliers are
    repeated (`repeat_multipliers`), and every share has whole ones.
    """
    return GROUP if share == inputs else math.gcd(share, GROUP)


def multiplier_count(share: int, inputs: int) -> int:
    """Return how many multipliers a row has in a share of a layer's inputs."""
    return -(-share // channels_of_multiplier(share, inputs))


def repeat_multipliers(multipliers: Tensor, channels: int, inputs: int) -> Tensor:
    """Give every so many channels a multiplier of their own.

    uint8 [out, ceil(inputs / GROUP)] -> uint8 [out, inputs / channels], as it is for GROUP.
    """
    if channels == GROUP:
        return multipliers
    return multipliers.repeat_interleave(GROUP // channels, dim=-1)[..., : inputs // channels]


def pack_int4(values: Tensor, multipliers: Tensor) -> Tensor:
    """Divide values by their multipliers, and put two into a byte, the first into its lower half.

    int8 [out, n] of an even n, uint8 [out, ceil(n / KEPT)] -> uint8 [out, n / 2]. Each half is the
    quotient plus 8. The values must be -8 to 7 times the multipliers, which are 1 to 16.
    """
    quotients = _grouped(values, KEPT) // multipliers.view(torch.int8)[..., None]
    halves = (quotients.flatten(-2)[..., : values.shape[-1]] - SMALLEST).view(torch.uint8)
    return halves[..., 0::2] | halves[..., 1::2] << 4


def unpack_int4(packed: Tensor, multipliers: Tensor) -> Tensor:
    """Undo `pack_int4`: uint8 [..., n / 2] and [..., groups] -> int8 [..., n].

    Groups are of KEPT values, the last one maybe of fewer, or equal parts of fewer each.
    """
    count, groups = 2 * packed.shape[-1], multipliers.shape[-1]
    each = KEPT if groups == -(-count // KEPT) else count // groups
    values = packed.new_empty((*packed.shape[:-1], count))
    torch.bitwise_and(packed, 15, out=values[..., 0::2])
    torch.bitwise_right_shift(packed, 4, out=values[..., 1::2])
    values = values.view(torch.int8).add_(SMALLEST)
    grouped = _grouped(values, each)
    grouped *= multipliers.view(torch.int8)[..., None]
    return grouped.flatten(-2)[..., :count]


def stored_values(packed: Tensor, multipliers: Tensor | None) -> Tensor:
    """Return the values of a layer from the tensors that hold them, int4 values as int8."""
    return packed if multipliers is None else unpack_int4(packed, multipliers)


def multiplier_problems(name: str, multipliers: Tensor) -> list[Problem]:
    """List the rule that the multipliers of a layer break, if any: 1 to 16."""
    wrong = (multipliers < 1) | (multipliers > MOST)
    if not bool(wrong.any()):
        return []
    return [Problem(name, f"{int(multipliers[wrong][0])}", f"1 to {MOST}", FETCH_AGAIN)]


def _grouped(rows: Tensor, each: int) -> Tensor:
    """[..., n] -> [..., groups, each], zeros past the last value; a view where there are none."""
    missing = -rows.shape[-1] % each
    whole = functional.pad(rows, (0, missing)) if missing else rows
    return whole.unflatten(-1, (-1, each))
