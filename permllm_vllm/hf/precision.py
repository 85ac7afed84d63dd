"""What a model keeps in float32, whatever dtype it is loaded in: biases of routers, above all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kept_in_float32(model: Any, name: str, dtype: torch.dtype) -> bool:
    """Whether a model of Transformers has a tensor in float32 when it is loaded in ``dtype``.

    Args:
        model: with what its class and those of its modules say about that.
        name: of a parameter or buffer in it.
        dtype: of the model.
    """
    kept = set(model._keep_in_fp32_modules_strict or ())
    if dtype == torch.float16:
        kept |= set(model._keep_in_fp32_modules or ())
    return dtype in (torch.float16, torch.bfloat16) and any(part in name for part in kept)


def as_loaded(model: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in the dtype that it has in a model of ``dtype``; whole numbers stay."""
    if not tensor.is_floating_point():
        return tensor
    return tensor.to(torch.float32 if kept_in_float32(model, name, dtype) else dtype)
