"""Gated activations of an eager engine on a CPU, one kernel for each.

vLLM 0.32 runs four operations of PyTorch for one on a CPU, and writes the activated gate to memory
between them. In a compiled model Inductor fuses them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from permllm_vllm import ops
from permllm_vllm.compat import GeluAndMul, SiluAndMul


def activate_by_kernel(model: Module, *, eager: bool) -> None:
    """Have the gated activations of a model run the kernel, unless the user turned such ops off.

    The product of gate and factor is rounded once. PyTorch rounds the activated gate before.
    """
    if not eager or ops.missing_reason:
        return
    for module in model.modules():
        kernel = _kernel_of(module)
        # What a module calls, vLLM chooses as it is built: by `--compilation-config` and platform.
        if kernel is not None and module._forward_method == module.forward_cpu:
            module._forward_method = kernel  # type: ignore[assignment]


def _kernel_of(module: Any) -> Callable[[Tensor], Tensor] | None:
    """What computes the same as a module of vLLM's; None where nothing here does."""
    if type(module) is SiluAndMul:
        return _silu_and_mul
    if type(module) is GeluAndMul and module.approximate == "tanh":
        return _gelu_tanh_and_mul
    return None


def _silu_and_mul(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.permllm.silu_and_mul(x)
    return result


def _gelu_tanh_and_mul(x: Tensor) -> Tensor:
    result: Tensor = torch.ops.permllm.gelu_tanh_and_mul(x)
    return result
