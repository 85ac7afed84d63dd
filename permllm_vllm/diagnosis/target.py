"""What kind of device this machine is, and the loosest pattern that it runs at full speed."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from permllm_vllm import ops
from permllm_vllm.backends.cpu import instruction_sets
from permllm_vllm.backends.cuda import LEAST_CAPABILITY
from permllm_vllm.diagnosis.environment import processor
from permllm_vllm.diagnosis.kernels import AMX_FEATURES

AUTO = "auto"
TARGETS: Mapping[str, str] = {"amx": "32:64", "cpu": "8:16", "gpu": "2:4"}
"""Kind of device -> pattern: AMX unpacks any half of 64 inputs, other CPUs shuffle 16 at a time,
and sparse tensor cores multiply 2:4 alone."""


def detected() -> str:
    """The key of `TARGETS` that is this machine: a GPU with sparse tensor cores comes first."""
    if _has_sparse_tensor_cores():
        return "gpu"
    if ops.missing_reason:  # nothing was compiled here, and the processor alone can be asked
        _, features = processor()
        return "amx" if features.issuperset(AMX_FEATURES) else "cpu"
    return "amx" if "amx" in instruction_sets() else "cpu"


def _has_sparse_tensor_cores() -> bool:
    if torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability() >= LEAST_CAPABILITY
