"""What a recurrence over tokens keeps for a backward pass: far more than what its linears read."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

_TOKENS = 512
"""Of whole chunks, in which such modules go through a text; more take as much for each."""


def kept_bytes(module: nn.Module, channels: int, dtype: torch.dtype) -> float:
    """Count what autograd keeps of a forward pass for each token; parameters are left out.

    Args:
        module: of a model without weights, on the meta device: nothing is computed.
        channels: of its input.
        dtype: of its input and its parameters.

    Returns:
        Bytes for each token; 0.0 where a kernel that Transformers has found takes no such tensors.
    """
    module = deepcopy(module).to(dtype).eval().requires_grad_()
    states = torch.empty(1, _TOKENS, channels, dtype=dtype, device="meta", requires_grad=True)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor  # held, so that no other gets its place
        return tensor

    try:
        with torch.enable_grad(), saved_tensors_hooks(keep, lambda tensor: tensor):
            module(states)
    except Exception:  # of packages for GPUs, whose kinds nobody lists
        return 0.0
    for parameter in module.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / _TOKENS
