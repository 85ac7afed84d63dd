"""RMS norms of an eager engine on a CPU, one kernel for each.

vLLM runs eight operations of PyTorch for a norm on a CPU: its own kernel is for GPUs. With one
sequence of a small model of int8 values they were 7 to 8 % of a token's time on Zen 3 and 4, and
are 3 % now (docs/cpu.md). In a compiled model Inductor fuses them.

Upstream: not reported; `vllm.ir.ops` has no other provider for a CPU. For vLLM 0.32.
"""

import torch
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.compat import fused_add_rms_norm, rms_norm

PROVIDER = "permllm"
"""Name of the kernel in ``--ir-op-priority``, for who serves dense models with it too."""
PYTORCH = "native"


def _fits(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    return (
        variance_size is None
        and x.device.type == "cpu"
        and (weight is None or weight.dtype in (x.dtype, torch.float32))
    )


def _fits_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    in_place = x.is_contiguous() and x_residual.is_contiguous() and x_residual.dtype == x.dtype
    return in_place and _fits(x, weight, epsilon, variance_size)


def _norm(
    x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> Tensor:
    return torch.ops.permllm.rms_norm(x, weight, epsilon)


def _norm_of_sum(
    x: Tensor,
    x_residual: Tensor,
    weight: Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    torch.ops.permllm.add_rms_norm_(x, x_residual, weight, epsilon)
    return x, x_residual


rms_norm.register_impl(PROVIDER, supports_args=_fits)(_norm)
fused_add_rms_norm.register_impl(PROVIDER, supports_args=_fits_sum, inplace=True)(_norm_of_sum)


def normalize_by_kernel(*, eager: bool) -> None:
    """Have the norms of this process run the kernel, unless the user named what else does.

    Results are those of PyTorch but for the order in which squares are added.
    """
    if not eager or ops.missing_reason or not torch.ops.permllm.cpu_has_norm():
        return
    for operation in (rms_norm, fused_add_rms_norm):
        if operation.get_priority() == [PYTORCH]:
            operation.set_default([PROVIDER, PYTORCH])
