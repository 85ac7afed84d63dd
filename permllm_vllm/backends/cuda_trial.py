"""One small layer on a GPU: names of architectures do not tell whether kernels run there.

A library that was built with a newer toolkit than the driver loads, and its first call fails.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.backends.weights import CheckpointWeights
from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern

TOKENS, OUTPUTS, INPUTS = 8, 64, 128
PATTERN = Pattern(2, 4)


def failure(device: torch.device) -> str:
    """Why the kernels cannot serve on this GPU, empty where they can; tried once in a process."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return _failure(index)


@cache
def _failure(index: int) -> str:
    try:
        right = is_right(torch.device("cuda", index))
    except RuntimeError as error:
        return f"the CUDA kernels were tried on GPU {index} and do not run: {_first_line(error)}"
    if right:
        return ""
    return (
        f"the CUDA kernels were tried on GPU {index} and the result of a small layer is wrong: "
        "serve the dense model there, and report this; does PERMLLM_CUDA_PDL=0 help?"
    )


def is_right(device: torch.device) -> bool:
    """Whether a small layer on `device` gives the very result of plain arithmetic.

    All numbers are integers, whose sums bfloat16 holds: nothing is rounded.

    Raises:
        RuntimeError: it cannot be multiplied there.
    """
    with torch.device("cpu"):  # models are loaded with another default
        weights, x, expected = _layer()
        packed = CudaBackend(torch.bfloat16).pack(weights)
    assert packed.metadata is not None
    assert packed.permutation is not None
    x, values, metadata, permutation = (
        tensor.to(device) for tensor in (x, packed.packed, packed.metadata, packed.permutation)
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the kernel requests weights early
    found = ops.sparse_linear(x, values, metadata, permutation, None, None, OUTPUTS, str(PATTERN))
    return torch.equal(found.cpu().double(), expected)


def _layer() -> tuple[CheckpointWeights, Tensor, Tensor]:
    """A layer with a permutation, activations `[TOKENS, INPUTS]` and their product in float64."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(OUTPUTS, INPUTS // 4, 4, generator=generator).topk(2).indices
    mask = torch.zeros(OUTPUTS, INPUTS // 4, 4, dtype=torch.bool).scatter_(2, kept, True).flatten(1)
    weight, x = (
        torch.randint(-1, 2, (rows, INPUTS), generator=generator).bfloat16()
        for rows in (OUTPUTS, TOKENS)
    )
    permutation = torch.randperm(INPUTS, generator=generator)
    weights = CheckpointWeights(
        values=pack_values(weight, mask, PATTERN),
        mask=pack_mask(mask),
        permutation=permutation.to(torch.uint8),
        scale=None,
        pattern=PATTERN,
        block_size=INPUTS,
    )
    return weights, x, x[:, permutation].double() @ (weight * mask).double().t()


def _first_line(error: RuntimeError) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
