"""The one place that picks a backend for a device and a dtype."""

from __future__ import annotations

import logging

import torch

from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.cuda import CudaBackend, unsupported_reason
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.backends.weights import Backend, CheckpointWeights, PackedWeights

__all__ = [
    "Backend",
    "CheckpointWeights",
    "PackedWeights",
    "fallback_reason",
    "select_backend",
]

logger = logging.getLogger(__name__)


def fallback_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why layers of this dtype and device run on the reference backend; empty if they do not."""
    if device.type == "cuda":
        return unsupported_reason(device, dtype)
    if device.type != "cpu":
        return f"there is no kernel for {device.type} yet"
    if dtype != torch.bfloat16:
        return (
            f"the CPU kernels compute in bfloat16, the model is {str(dtype).removeprefix('torch.')}"
            "; load it in bfloat16 (vLLM: --dtype bfloat16) to use them"
        )
    return ops.missing_reason


def select_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Picks the backend for layers with activations of `dtype` on `device`.

    Falls back to the reference backend where no kernel exists, with `fallback_reason` as a warning.

    Raises:
        RuntimeError: PERMLLM_CPU_ISA names an instruction set that cannot run here.
    """
    reason = fallback_reason(device, dtype)
    if not reason:
        return CudaBackend(dtype) if device.type == "cuda" else CpuBackend()
    logger.warning(
        "sparse layers run on the reference backend, as slow and as large as dense ones: %s",
        reason,
    )
    return ReferenceBackend(dtype)
