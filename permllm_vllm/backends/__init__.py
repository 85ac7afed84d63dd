"""The one place that picks a backend for a device and a dtype."""

from __future__ import annotations

import logging

import torch

from permllm_vllm import ops
from permllm_vllm.backends import cuda
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.backends.weights import (
    Backend,
    CheckpointWeights,
    PackedWeights,
    StackedWeights,
)
from permllm_vllm.checkpoint.pattern import Pattern

__all__ = [
    "Backend",
    "CheckpointWeights",
    "CpuBackend",
    "CudaBackend",
    "PackedWeights",
    "ReferenceBackend",
    "SelectedBackend",
    "StackedWeights",
    "fallback_reason",
    "require_pattern",
    "select_backend",
]

logger = logging.getLogger(__name__)

SelectedBackend = CpuBackend | CudaBackend | ReferenceBackend
"""What `select_backend` returns."""

#: What the CPU kernels multiply.
ACTIVATIONS = (torch.bfloat16, torch.float16, torch.float32)


def fallback_reason(
    device: torch.device,
    dtype: torch.dtype,
    values: torch.dtype | None = None,
    *,
    experts: bool = False,
) -> str:
    """Why layers of this dtype and device run on the reference backend; empty if they do not.

    Args:
        device: where the model is.
        dtype: of the activations.
        values: dtype of the sparse values in the checkpoint; that of the activations by default.
        experts: whether the layers are the experts of a mixture.
    """
    if device.type == "cuda" and experts:
        return "the CUDA kernels multiply no experts: serve the model on the CPU for sparse ones"
    if device.type == "cuda":
        return cuda.unsupported_reason(device, dtype)
    if device.type != "cpu":
        return f"there is no kernel for {device.type} yet"
    if dtype not in ACTIVATIONS:
        return f"the CPU kernels take no {_name(dtype)} activations; load the model in bfloat16"
    if dtype == torch.float32 and values in (None, torch.float32):
        return (
            "the CPU kernels hold values of bfloat16 or int8, the model and its checkpoint are "
            "float32; load it in bfloat16 (vLLM: --dtype bfloat16) to round and use them"
        )
    return ops.missing_reason


def require_pattern(device: torch.device, pattern: Pattern) -> None:
    """Raises RuntimeError where no backend serves this pattern there: a GPU takes 2:4 alone."""
    if device.type == "cuda":
        cuda.require_pattern(pattern)


def select_backend(
    device: torch.device,
    dtype: torch.dtype,
    values: torch.dtype | None = None,
    *,
    experts: bool = False,
) -> SelectedBackend:
    """Picks the backend for layers with activations of `dtype` on `device`.

    Falls back to the reference backend where no kernel exists, with `fallback_reason` as a warning.
    The CPU kernels round values of float16 and float32 to bfloat16; a warning says so.

    Args:
        device: where the model is.
        dtype: of the activations.
        values: dtype of the sparse values in the checkpoint; that of the activations by default.
        experts: whether the layers are the experts of a mixture.

    Raises:
        RuntimeError: PERMLLM_CPU_ISA names an instruction set that cannot run here.
    """
    values = values or dtype
    reason = fallback_reason(device, dtype, values, experts=experts)
    if not reason and device.type == "cuda":
        return CudaBackend(dtype)
    if not reason:
        if torch.bfloat16 not in (dtype, values) and values.is_floating_point:
            logger.warning(
                "the CPU kernels hold bfloat16: the %s values of sparse layers are rounded, as "
                "with --dtype bfloat16",
                _name(values),
            )
        return CpuBackend(dtype=dtype, values=values)
    logger.warning(
        "sparse layers run on the reference backend, as slow and as large as dense ones: %s",
        reason,
    )
    return ReferenceBackend(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
