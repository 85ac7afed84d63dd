"""Compiled kernels for bfloat16 on x86-64 and, in plain C++, on any CPU (csrc/cpu)."""

from __future__ import annotations

import torch

from permllm_vllm import ops
from permllm_vllm.backends.weights import CheckpointWeights, PackedWeights
from permllm_vllm.checkpoint import permutation as permutations

#: Largest block whose permutation disappears inside the kernel's blocks of 64 inputs.
LARGEST_UNDONE_BLOCK = 64


class CpuBackend:
    """Packs to blocks of a few rows x 64 inputs with 64-bit masks (csrc/cpu/layout.h).

    Args:
        instruction_set: "amx", "avx512_bf16" or "portable"; empty for the fastest that this CPU
            runs, or the one in the environment variable PERMLLM_CPU_ISA.

    Raises:
        RuntimeError: the instruction set is unknown, or this CPU or build cannot run it.
    """

    name = "cpu"

    def __init__(self, instruction_set: str = ""):
        if ops.missing_reason:
            raise RuntimeError(f"the compiled CPU kernels are missing: {ops.missing_reason}")
        self.instruction_set = instruction_set or torch.ops.permllm.cpu_instruction_set()

    def pack(self, weights: CheckpointWeights) -> PackedWeights:
        """Packs one layer; int8 values are scaled and rounded to bfloat16.

        The permutation of blocks of 32 and 64 is undone here and costs nothing at run time; that of
        blocks of 128 is kept as int32 indices into all inputs, and the activation is gathered.
        """
        values = weights.values
        if weights.scale is not None:
            values = values.float() * weights.scale.float().unsqueeze(1)
        local, gather = weights.permutation, None
        if local is not None and weights.block_size > LARGEST_UNDONE_BLOCK:
            gather = permutations.absolute(local, weights.block_size).to(torch.int32)
            local = None
        packed, metadata = torch.ops.permllm.cpu_pack(
            values.to(torch.bfloat16), weights.mask, local, weights.block_size, self.instruction_set
        )
        return PackedWeights(packed, metadata, gather)


def instruction_sets() -> list[str]:
    """Instruction sets that this CPU and build run, fastest first; empty without the library."""
    if ops.missing_reason:
        return []
    return torch.ops.permllm.cpu_instruction_sets().split(",")
