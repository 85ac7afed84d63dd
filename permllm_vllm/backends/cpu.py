"""Compiled kernels on x86-64 and, in plain C++, on any CPU (csrc/cpu)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.backends.rounded import round_rows
from permllm_vllm.backends.weights import (
    CheckpointWeights,
    PackedWeights,
    StackedWeights,
    stacked,
)
from permllm_vllm.checkpoint import permutation as permutations

logger = logging.getLogger(__name__)

#: Largest block whose permutation disappears inside the kernel's blocks of 64 inputs.
LARGEST_UNDONE_BLOCK = 64
# What the kernels take is asked here before anything is packed; a test holds it against them.

#: Instruction sets whose kernels take any 32 of 64 inputs, or shuffle them by a packed order, so
#: that it can, and activations of bfloat16 and float16 alone.
SIXTEEN_BITS_ONLY = ("amx", "zen5", "avx512_bf16", "avx512_vbmi2")
#: Of these, one without kernels for bfloat16 values.
INT8_ONLY = ("avx512_vbmi2",)
#: Pattern -> instruction set -> how many times as long as 2:4 its layers take there, where that is
#: more than a tenth. Measured on Zen 5 (docs/results.md), the others by trials there with 1 to 64
#: tokens; avx512_bf16 takes the number of zen5, avx2_vnni that of avx2.
SLOWER = {
    "32:64": {
        "zen5": "up to 1.6",
        "avx512_bf16": "up to 1.6",
        "avx512_vnni": "1.7 to 4.7",
        "avx2_vnni": "1.1 to 4.2",
        "avx2": "1.1 to 4.2",
    }
}
#: What every CPU runs at full speed.
FULL_SPEED_PATTERN = "8:16"
#: Beyond, sums of products of int8 values leave an int32 (csrc/cpu/packing/layout.h).
MOST_INT8_INPUTS = 1 << 17
#: Of a packed weight, in bytes.
ALIGNMENT = 64
#: The place in its header that says what its values are, and those that say int8 in 4 bits
#: (csrc/cpu/packing/layout.h; tests/kernels/test_four_bits.py holds them against it).
_VALUES_FIELD, _FOUR_BITS = 5, (9, 10, 11, 14)


class CpuBackend:
    """Packs to blocks of a few rows x 64 inputs, as csrc/cpu/packing/layout.h says.

    Args:
        instruction_set: one of `instruction_sets`; empty for the fastest that this CPU runs, or the
            one in the environment variable PERMLLM_CPU_ISA.
        dtype: of the activations. Those of float32 are multiplied in float32, by the kernels of the
            next instruction set that do so.
        values: dtype of the sparse values that `instruction_set` shall speak of. Whatever it says,
            `pack` leaves values that it has no kernels for to the next.

    Raises:
        RuntimeError: the kernels are missing. An instruction set that is unknown, or that this CPU
            or build cannot run, is refused by `pack`.
    """

    name = "cpu"

    def __init__(
        self,
        instruction_set: str = "",
        dtype: torch.dtype = torch.bfloat16,
        values: torch.dtype = torch.int8,
    ):
        if ops.missing_reason:
            raise RuntimeError(f"the compiled CPU kernels are missing: {ops.missing_reason}")
        chosen = instruction_set or torch.ops.permllm.cpu_instruction_set()
        if dtype == torch.float32 and chosen in SIXTEEN_BITS_ONLY:
            chosen = _fastest_of_float32()
        self.instruction_set = chosen
        if values != torch.int8:
            self.instruction_set = self._of_bfloat16()

    def pack(self, weights: CheckpointWeights) -> PackedWeights:
        """Packs one layer.

        int8 values stay int8 where a kernel of this instruction set multiplies them, and the scale
        goes along; elsewhere they are scaled and rounded to bfloat16, as float16 and float32 are.
        Where kernels read 4 bits, and all values of a layer fit, they take 4 bits each. On AVX2 x
        is then rounded to 8 bits with any number of tokens.

        Where kernels take any 32 of 64 inputs the permutation of blocks of 32 and 64 is undone
        here, or packed with the values, and costs nothing at run time. That of blocks of 128, and
        any on the other instruction sets, is kept as int32 indices into all inputs, and the
        activation is gathered.
        """
        values, scale, chosen = weights.values, weights.scale, self.instruction_set
        if scale is not None:
            scale = scale.float().contiguous()
            if not self._packs_int8(values.shape[1] * 2):
                values, scale = values.float() * scale.unsqueeze(1), None
        if scale is None:
            values, chosen = values.to(torch.bfloat16), self._of_bfloat16()
        _warn_of_slow(str(weights.pattern), chosen)
        local, gather = weights.permutation, None
        undone = chosen in SIXTEEN_BITS_ONLY and weights.block_size <= LARGEST_UNDONE_BLOCK
        if local is not None and not undone:
            gather = permutations.absolute(local, weights.block_size).to(torch.int32)
            local = None
        packed, metadata = torch.ops.permllm.cpu_pack(
            values, weights.mask, local, weights.block_size, chosen, weights.pattern.group
        )
        four_bits = int(metadata[_VALUES_FIELD]) in _FOUR_BITS
        return PackedWeights(packed, metadata, gather, scale, four_bits)

    def pack_dense(self, weight: Tensor) -> PackedWeights | None:
        """Packs a dense weight `[out, in]` of bfloat16 in 12 bits each, without loss.

        None where no kernel of this instruction set reads that, or the weight does not fit: its
        dtype is another, its inputs are no multiple of 8, or too many of its values are tiny beside
        the largest of their row.
        """
        if weight.dtype != torch.bfloat16 or weight.shape[1] % 8 != 0:
            return None
        packed, metadata = torch.ops.permllm.cpu_pack_dense(weight, self.instruction_set)
        return PackedWeights(packed, metadata) if packed.numel() else None

    def round_dense(self, weight: Tensor) -> PackedWeights | None:
        """Packs a dense weight `[out, in]`, rounded to int8 with a scale for each row.

        None where no kernel of this instruction set reads that, or it has too many inputs, or no
        multiple of 8.
        """
        if not self.rounds_dense(weight.shape[1]):
            return None
        values, scale = round_rows(weight)
        packed, metadata = torch.ops.permllm.cpu_pack_dense(values, self.instruction_set)
        return PackedWeights(packed, metadata, scale=scale)

    def rounds_dense(self, inputs: int) -> bool:
        """Whether `round_dense` packs weights of so many inputs."""
        if inputs % 8:
            return False
        row = torch.zeros((1, inputs), dtype=torch.int8, device="cpu")
        packed, _ = torch.ops.permllm.cpu_pack_dense(row, self.instruction_set)
        return packed.numel() > 0

    def stack(self, experts: Sequence[PackedWeights]) -> StackedWeights:
        """Puts the packed weights of one linear layer of all experts into one piece.

        The thread that copies touches its pages first: workers of vLLM stay on one NUMA node.
        """
        sizes = [-(-one.packed.numel() // ALIGNMENT) * ALIGNMENT for one in experts]
        packed = torch.ops.permllm.cpu_huge_bytes(sum(sizes))
        places = [0, *accumulate(sizes)][: len(sizes)]
        for place, one in zip(places, experts, strict=True):
            packed[place : place + one.packed.numel()].copy_(one.packed)
        metadata = stacked([one.metadata for one in experts])
        if metadata is None:
            raise ValueError("packed weights of the CPU have metadata; these have none")
        return StackedWeights(
            packed,
            torch.cat([metadata, torch.tensor(places).unsqueeze(1)], dim=1),
            stacked([one.permutation for one in experts]),
            stacked([one.scale for one in experts]),
        )

    def _of_bfloat16(self) -> str:
        """The instruction set whose kernels multiply bfloat16 values."""
        return _fastest_of_float32() if self.instruction_set in INT8_ONLY else self.instruction_set

    def _packs_int8(self, inputs: int) -> bool:
        """Whether a kernel multiplies int8 values of this many inputs."""
        return inputs <= MOST_INT8_INPUTS and torch.ops.permllm.cpu_packs_int8(self.instruction_set)


@functools.cache
def _warn_of_slow(pattern: str, instruction_set: str) -> None:
    """Say once in a process that kernels run a pattern below full speed, and what helps."""
    times = SLOWER.get(pattern, {}).get(instruction_set)
    if times is None:
        return
    logger.warning(
        "sparse layers of pattern %s run %s times as long on %s as those of %s, which lose more "
        "quality; prune with --pattern %s if speed matters more",
        *(pattern, times, instruction_set, FULL_SPEED_PATTERN, FULL_SPEED_PATTERN),
    )


def _fastest_of_float32() -> str:
    """The fastest instruction set whose kernels multiply in float32."""
    return next(isa for isa in instruction_sets() if isa not in SIXTEEN_BITS_ONLY)


def instruction_sets() -> list[str]:
    """Instruction sets that this CPU and build run, fastest first; empty without the library."""
    if ops.missing_reason:
        return []
    return torch.ops.permllm.cpu_instruction_sets().split(",")
