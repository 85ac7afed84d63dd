"""What a model keeps in float32, whatever dtype it is loaded in: biases of routers, above all."""

from __future__ import annotations

from typing import Any

import torch


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
