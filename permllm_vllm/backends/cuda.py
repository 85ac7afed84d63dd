"""Compiled kernels for sparse tensor cores, NVIDIA GPUs from compute capability 8.0 on (csrc/cuda).

Packing is plain tensor code and runs on any device; what it writes is described in
csrc/cuda/format.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.backends.weights import CheckpointWeights, PackedWeights
from permllm_vllm.checkpoint import packing
from permllm_vllm.checkpoint import permutation as permutations
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN = Pattern(2, 4)
DTYPES = (torch.bfloat16, torch.float16)
LEAST_CAPABILITY = (8, 0)
ROW_MULTIPLE = 128
INPUT_MULTIPLE = 128
PADDING = 0x44  # metadata of two groups that keep their first two inputs
#: Where in a run of eight groups the kernels want the 8-bit values of each group.
INT8_GROUP_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def unsupported_reason(device: torch.device, dtype: torch.dtype) -> str:
    """Why no CUDA kernel computes in `dtype` on `device`; empty where one does."""
    if torch.version.hip is not None:  # PyTorch calls AMD's GPUs cuda too
        return "there is no kernel for AMD GPUs yet"
    if dtype not in DTYPES:
        return (
            f"the CUDA kernels compute in bfloat16 or float16, the model is {_name(dtype)}: load "
            "it in bfloat16 (vLLM: --dtype bfloat16)"
        )
    if ops.cuda_missing_reason:
        return ops.cuda_missing_reason
    if not torch.cuda.is_available():
        return (
            "torch.cuda.is_available() is false: check nvidia-smi, and that PyTorch is one for CUDA"
        )
    built = torch.ops.permllm.cuda_architectures().split()
    return missing_architecture(torch.cuda.get_device_capability(device), built)


def missing_architecture(capability: tuple[int, int], built: list[str]) -> str:
    """Why a GPU of this compute capability cannot run the `built` architectures; empty if it can.

    Machine code runs on its major version, from its minor version on; with the suffix a it runs on
    its own version alone. Of the last architecture, where it has no suffix, there is PTX too, which
    later GPUs compile when they load it. What is advised is the first minor version, which every
    nvcc of its major version knows.
    """
    version = ".".join(map(str, capability))
    if capability < LEAST_CAPABILITY:
        return (
            f"the GPU has compute capability {version}, sparse tensor cores need 8.0 or later: "
            "serve the dense model on it"
        )
    if any(_runs(name, capability) for name in built):
        return ""
    if built[-1].isdigit() and _version(built[-1]) <= capability:
        return ""
    return (
        f"the GPU has compute capability {version} and the kernels were built for "
        f"{', '.join(built)}: install again with PERMLLM_CUDA_ARCHS={capability[0]}0"
    )


def _version(architecture: str) -> tuple[int, int]:
    return divmod(int(architecture.rstrip("af")), 10)


def _runs(architecture: str, capability: tuple[int, int]) -> bool:
    if architecture.endswith("a"):
        return _version(architecture) == capability
    return (capability[0], 0) <= _version(architecture) <= capability


class CudaBackend:
    """Packs 2:4 weights in the one format that all kernels read.

    int8 values stay int8 in memory and are multiplied in `dtype`; their scale is applied to the
    sums.

    Args:
        dtype: of the activations, bfloat16 or float16.

    Raises:
        ValueError: another dtype.
    """

    name = "cuda"
    instruction_set = "mma.sp"

    def __init__(self, dtype: torch.dtype):
        if dtype not in DTYPES:
            raise ValueError(
                f"the CUDA kernels compute in bfloat16 or float16, not in {_name(dtype)}: load the "
                "model with dtype bfloat16"
            )
        self.dtype = dtype

    def pack(self, weights: CheckpointWeights) -> PackedWeights:
        """Packs one layer on the device of its tensors.

        Raises:
            RuntimeError: it is not 2:4, a mask keeps a wrong number, or tensors do not fit.
        """
        _check(weights)
        values = weights.values
        if values.dtype == torch.int8:
            values = interleave_int8(pad_values(values))
        else:
            values = pad_values(values.to(self.dtype))
        return PackedWeights(
            packed=values,
            metadata=pack_metadata(weights.mask),
            permutation=_pack_permutation(weights),
            scale=None if weights.scale is None else weights.scale.float().contiguous(),
        )


def pad_values(values: Tensor) -> Tensor:
    """Pads kept values `[out, in / 2]` with zeros to multiples of 128 outputs and 128 inputs."""
    rows, columns = values.shape
    padded = values.new_zeros(
        _round_up(rows, ROW_MULTIPLE), _round_up(columns * 2, INPUT_MULTIPLE) // 2
    )
    padded[:rows, :columns] = values
    return padded


def interleave_int8(values: Tensor) -> Tensor:
    """Orders the groups of each run of 16 kept values as the kernels load them; same shape."""
    order = torch.tensor(INT8_GROUP_ORDER, device=values.device)
    groups = values.unflatten(1, (-1, len(INT8_GROUP_ORDER), PATTERN.kept))
    return groups.index_select(2, order).flatten(1).contiguous()


def pack_metadata(mask: Tensor) -> Tensor:
    """Turns a packed 2:4 mask into the operand that names the kept inputs of every group.

    uint8 [out, in / 8] -> uint8 [padded in / 128, padded out / 64, 1024], in the order of
    csrc/cuda/format.h.
    """
    rows, columns = mask.shape
    padded = mask.new_full(
        (_round_up(rows, ROW_MULTIPLE), _round_up(columns * 8, INPUT_MULTIPLE) // 8), PADDING
    )
    padded[:rows, :columns] = _metadata_of_mask_byte().to(mask.device)[mask.int()]
    # Outputs are 64 a + 16 b + 8 c + d, bytes of 8 inputs are 16 e + 4 f + 2 g + h.
    a, b, c, d = range(4)
    e, f, g, h = range(4, 8)
    split = padded.view(-1, 4, 2, 8, padded.shape[1] // 16, 4, 2, 2)
    ordered = split.permute(e, a, b, g, d, f, c, h)
    return ordered.reshape(padded.shape[1] // 16, padded.shape[0] // 64, 1024)


def _metadata_of_mask_byte() -> Tensor:
    """For each byte of a mask: first | second << 2 of its lower group, and of the upper one << 4.

    uint8 [256]; entries of bytes that do not keep two of four are never read.
    """
    of_group = [0] * 16
    for first in range(4):
        for second in range(first + 1, 4):
            of_group[1 << first | 1 << second] = first | second << 2
    table = [of_group[byte & 15] | of_group[byte >> 4] << 4 for byte in range(256)]
    return torch.tensor(table, dtype=torch.uint8)


def _pack_permutation(weights: CheckpointWeights) -> Tensor | None:
    """The permutation, local to blocks of 128 and padded; None where the layer has none.

    One that moves nothing stays: compiled graphs and weights that are loaded anew take an operand
    for granted where the checkpoint lists one, whatever it holds.
    """
    if weights.permutation is None:
        return None
    absolute = permutations.absolute(weights.permutation, weights.block_size)
    places = torch.arange(_round_up(absolute.numel(), INPUT_MULTIPLE), device=absolute.device)
    places[: absolute.numel()] = absolute
    return (places % INPUT_MULTIPLE).to(torch.uint8)


def require_pattern(pattern: Pattern) -> None:
    """Raises RuntimeError where a GPU cannot serve this pattern, with kernels or without."""
    if pattern != PATTERN:
        raise RuntimeError(
            f"pattern {pattern} has no CUDA kernel: sparse tensor cores multiply 2:4 at 16 "
            "bits. Prune with the pattern 2:4 (--target gpu), serve this checkpoint on the CPU, or "
            "serve the dense model"
        )


def _check(weights: CheckpointWeights) -> None:
    values, mask = weights.values, weights.mask
    require_pattern(weights.pattern)
    if values.dim() != 2 or mask.dim() != 2 or mask.shape[0] != values.shape[0]:
        raise RuntimeError(
            f"values {tuple(values.shape)} and mask {tuple(mask.shape)} do not fit: they are "
            "[out, in / 2] and [out, in / 8]; read both from one checkpoint"
        )
    if mask.dtype != torch.uint8 or mask.shape[1] * 4 != values.shape[1]:
        raise RuntimeError(
            f"mask is {_name(mask.dtype)} {tuple(mask.shape)}, values are {tuple(values.shape)}: "
            f"the mask must be uint8 [{values.shape[0]}, {values.shape[1] // 4}]; read both from "
            "one checkpoint"
        )
    violation = packing.first_violation(mask, PATTERN)
    if violation is not None:
        row, group, kept = violation
        raise RuntimeError(
            f"mask keeps {kept} weights in group {group} of row {row}, the pattern 2:4 exactly 2: "
            "the checkpoint is corrupted, write it again"
        )
    if (values.dtype == torch.int8) != (weights.scale is not None):
        raise RuntimeError(
            f"values are {_name(values.dtype)} and the scale is "
            f"{'missing' if weights.scale is None else 'there'}: int8 values have one, others have "
            "none; write the checkpoint again"
        )
    local = weights.permutation
    if local is not None and (
        local.numel() != values.shape[1] * 2
        or not permutations.is_bijective(local, weights.block_size)
    ):
        raise RuntimeError(
            f"permutation of {local.numel()} entries is no bijection in blocks of "
            f"{weights.block_size} of {values.shape[1] * 2} inputs: the checkpoint is corrupted, "
            "write it again"
        )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
