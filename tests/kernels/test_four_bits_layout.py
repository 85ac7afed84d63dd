"""int8 values in 4 bits: what the bytes of a packed layer say, read one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import random_layer, to_int4
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint import packing
from tests.kernels.cases import GROUPS, LANES, on_each_with_four_bits
from tests.kernels.test_lanes import FOURS, INPUTS, PATTERNS, VALUES, fitting, input_of, place_bytes

SUM_BYTES = 4

pytestmark = on_each_with_four_bits


@dataclass(frozen=True)
class Block:
    """What csrc/cpu/packing/layout.h says of the blocks of an instruction set."""

    isa: str
    pattern: str

    @property
    def rows(self) -> int:
        return 16 if self.isa == "amx" or self.isa in GROUPS else 8

    @property
    def bytes_of_places(self) -> int:
        """Of the places of the values, or the masks."""
        if self.isa in LANES:
            return place_bytes(self.pattern)
        return self.rows * INPUTS // 8

    @property
    def bytes(self) -> int:
        """Of all of a block."""
        multipliers = 0 if self.isa in LANES else self.rows
        return self.bytes_of_places + self.rows * INPUTS // 4 + multipliers

    def values(self, block: Tensor, row: int) -> Iterator[tuple[int, int]]:
        """The input and the quotient of every value of a row."""
        if self.isa in LANES:
            places = self._in_lanes(block, row)
        elif self.isa in GROUPS:
            places = self._in_groups(block, row)
        else:
            places = self._beside_masks(block, row)
        for place, byte, upper in places:
            bits = int(block[self.bytes_of_places + byte])
            yield place, (bits >> 4 if upper else bits & 15) - 8

    # The input of every value of a row, its byte, and whether it is in the upper four bits.

    def _in_lanes(self, block: Tensor, row: int) -> Iterator[tuple[int, int, bool]]:
        half = FOURS // 2
        for value in range(FOURS * VALUES):
            four, i = value // VALUES, value % VALUES
            byte = (four % half * self.rows + row) * VALUES + i
            yield input_of(block, row, value, self.pattern), byte, four >= half

    def _in_groups(self, block: Tensor, row: int) -> Iterator[tuple[int, int, bool]]:
        for group in range(INPUTS // 16):
            half, word = group // 2, 2 * row + group % 2
            first = half * INPUTS + 2 * word
            mask = int(block[first]) | int(block[first + 1]) << 8
            for value, place in enumerate(place for place in range(16) if mask >> place & 1):
                vector, byte = value // 4 * 2 + value % 2, 2 * word + value % 4 // 2
                yield 16 * group + place, (2 * half + vector % 2) * INPUTS + byte, vector >= 2

    def _beside_masks(self, block: Tensor, row: int) -> Iterator[tuple[int, int, bool]]:
        half = self.rows // 2
        kept = [j for j in range(INPUTS) if int(block[row * 8 + j // 8]) >> j % 8 & 1]
        for value, place in enumerate(kept):
            yield place, row % half * (INPUTS // 2) + value, row >= half


def unpacked(packed: Tensor, isa: str, n: int, k: int, pattern: str) -> Tensor:
    """Values times mask, `[n, k]`."""
    block = Block(isa, pattern)
    blocks, groups = -(-k // INPUTS), -(-n // block.rows)
    multipliers = packed[groups * (blocks * block.bytes + SUM_BYTES * block.rows) :]
    dense = torch.zeros(n, blocks * INPUTS, dtype=torch.int64)
    for row in range(n):
        for b in range(blocks):
            place = row // block.rows * blocks + b
            own = packed[place * block.bytes :][: block.bytes]
            if isa in LANES:
                multiplier = multipliers[place * block.rows + row % block.rows]
            else:
                multiplier = own[block.bytes - block.rows + row % block.rows]
            for place_in_block, quotient in block.values(own, row % block.rows):
                dense[row, b * INPUTS + place_in_block] += quotient * int(multiplier)
    assert not dense[:, k:].any()
    return dense[:, :k]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 64), (13, 72), (20, 200)])
def test_the_bytes_are_those_of_the_layout(isa: str, n: int, k: int, pattern: str) -> None:
    n, k = fitting(n, k, pattern)
    layer = to_int4(random_layer(n, k, pattern, permuted=False, zeros=n == 20))
    packed = CpuBackend(isa).pack(layer.weights)
    assert packed.four_bits
    expected = packing.unpack(layer.weights.values, layer.weights.mask)
    assert torch.equal(unpacked(packed.packed, isa, n, k, pattern), expected.long())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (13, 72)])
def test_the_sums_of_values_stand_behind_the_blocks(isa: str, n: int, k: int, pattern: str) -> None:
    n, k = fitting(n, k, pattern)
    layer, block = to_int4(random_layer(n, k, pattern, permuted=False)), Block(isa, pattern)
    groups, blocks = -(-n // block.rows), -(-k // INPUTS)
    start = groups * blocks * block.bytes
    packed = CpuBackend(isa).pack(layer.weights).packed
    sums = packed[start : start + groups * block.rows * SUM_BYTES].clone().view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()
