"""The layers that every kernel of the CPU is tested with."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from benchmarks.shapes import Layer, random_layer
from permllm_vllm.backends.cpu import instruction_sets

TWELVE_BITS = ("amx", "zen5", "avx512_bf16")
"""Instruction sets that store bfloat16 values in 12 bits."""
LANES = ("avx2_vnni", "avx2")
"""Instruction sets whose blocks are in lanes."""
GROUPS = ("zen5", "avx512_bf16")
"""Instruction sets whose blocks of int8 values, and of sparse values in 12 bits, are in groups."""
FOUR_BITS = ("amx", "avx512_vbmi2", *GROUPS, *LANES)
"""Instruction sets that store int8 values in 4 bits."""


def _on_each(names: tuple[str, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "isa",
        [
            pytest.param(
                name,
                marks=pytest.mark.skipif(
                    name not in instruction_sets(), reason=f"this CPU or build does not run {name}"
                ),
            )
            for name in names
        ],
    )


on_each_with_twelve_bits = _on_each(TWELVE_BITS)
on_each_with_lanes = _on_each(LANES)
on_each_with_four_bits = _on_each(FOUR_BITS)
on_each_with_four_bits_and_masks = _on_each(tuple(name for name in FOUR_BITS if name not in LANES))


@dataclass(frozen=True)
class Case:
    """One shape of the kernel tests."""

    n: int
    k: int
    pattern: str
    block_size: int
    permuted: bool
    bias: bool
    zeros: bool

    def layer(self) -> Layer:
        return random_layer(
            self.n,
            self.k,
            self.pattern,
            self.block_size,
            permuted=self.permuted,
            bias=self.bias,
            zeros=self.zeros,
            seed=self.n * 1000 + self.k,
        )

    def __str__(self) -> str:
        marks = [f"{self.n}x{self.k}", self.pattern.replace(":", "of"), f"block{self.block_size}"]
        marks += [name for name in ("permuted", "bias", "zeros") if getattr(self, name)]
        return "-".join(marks)


def cases() -> Iterator[Case]:
    """Cases that reach every corner: ragged rows and inputs, all blocks, both patterns."""
    corners = itertools.cycle(itertools.product((False, True), (True, False)))
    for pattern in ("2:4", "4:8"):
        for n, k in ((1, 8), (8, 64), (13, 72), (33, 520), (40, 1096), (129, 200), (140, 2056)):
            bias, zeros = next(corners)
            yield Case(n, k, pattern, 64, permuted=False, bias=bias, zeros=zeros)
        for n, k, block_size in (
            (7, 96, 32),
            (48, 544, 32),
            (16, 64, 64),
            (50, 1088, 64),
            (300, 576, 64),
            (24, 128, 128),
            (72, 1152, 128),
        ):
            bias, zeros = next(corners)
            yield Case(n, k, pattern, block_size, permuted=True, bias=bias, zeros=zeros)
