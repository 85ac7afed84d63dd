"""The rules that stored numbers keep: values, scales and biases are finite, scales above 0."""

from __future__ import annotations

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem


def number_problems(name: str, numbers: Tensor) -> list[Problem]:
    """List the rule that the values [out, ...] or the bias [out] of a layer break, if any.

    `name`, the tensor's, is for the message; integers keep the rule.
    """
    if _all_finite(numbers):
        return []
    return [Problem(name, "inf or nan", "finite numbers", FETCH_AGAIN)]


def scale_problems(name: str, scale: Tensor) -> list[Problem]:
    """List the rule that the scales [out] of a layer's int8 values break, if any."""
    good = scale.isfinite() & (scale > 0)
    if bool(good.all()):
        return []
    return [Problem(name, f"{float(scale[~good][0])}", "finite and above 0", FETCH_AGAIN)]


def _all_finite(numbers: Tensor) -> bool:
    """Tell it from the extremes, which nan takes over: one pass, and no copy of the numbers."""
    if not numbers.is_floating_point() or not numbers.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in torch.aminmax(numbers))
