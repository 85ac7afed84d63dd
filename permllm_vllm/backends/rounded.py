"""Dense rows rounded to int8, with a scale for each."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
SMALLEST = 2.0**-119
"""Of the largest magnitude of a row: rows below are rounded as if it were theirs."""
_TOGETHER = 4096
"""Rows that are in memory as float32 at a time."""


def round_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight so that the largest magnitude of a row becomes 127.

    Args:
        weight: floating-point [out, in]; it stays as it is.

    Returns:
        int8 [out, in] and float32 [out], whose products are the weight to within half a scale.
    """
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scale = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    for first in range(0, len(weight), _TOGETHER):
        rows = weight[first : first + _TOGETHER].float()
        largest = rows.abs().amax(1).clamp_min(SMALLEST)
        scale[first : first + _TOGETHER] = largest / LARGEST
        steps = (rows * (LARGEST / largest).unsqueeze(1)).round_()
        values[first : first + _TOGETHER] = steps.to(torch.int8)
    return values, scale
