"""int8 values in 4 bits: what the bytes of a packed layer say, read one by one."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import random_layer, to_int4
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint import packing
from tests.kernels.cases import LANES, SLOTS, on_each_with_four_bits
from tests.kernels.test_lanes import EIGHTS, INPUTS, place_of
from tests.kernels.test_lanes import SLOTS as KEPT_OF_EIGHT

SUM_BYTES = 4

pytestmark = on_each_with_four_bits


@dataclass(frozen=True)
class Block:
    """What csrc/cpu/packing/layout.h says of the blocks of an instruction set."""

    isa: str
    pattern: str

    @property
    def rows(self) -> int:
        return 16 if self.isa == "amx" else 8

    @property
    def bytes_of_places(self) -> int:
        """Of the places of the values, or the masks."""
        if self.isa in LANES:
            return (3 if self.pattern == "4:8" else 2) * self.rows * KEPT_OF_EIGHT
        return self.rows * INPUTS // 8

    @property
    def bytes(self) -> int:
        """Of all of a block."""
        multipliers = 0 if self.isa in LANES else self.rows
        return self.bytes_of_places + self.rows * INPUTS // 4 + multipliers

    def values(self, block: Tensor, row: int) -> Iterator[tuple[int, int]]:
        """The input and the quotient of every value of a row."""
        for eight in range(EIGHTS):
            for slot, place in enumerate(self._places(block, row, eight)):
                byte, upper = self._place_of_value(row, eight, slot)
                bits = int(block[self.bytes_of_places + byte])
                yield 8 * eight + place, (bits >> 4 if upper else bits & 15) - 8

    def _places(self, block: Tensor, row: int, eight: int) -> list[int]:
        """The inputs, of eight, that a row keeps."""
        if self.isa in LANES:
            slots = range(KEPT_OF_EIGHT)
            return [place_of(block, row, eight, slot, self.pattern) for slot in slots]
        mask = int(block[row * 8 + eight])
        return [place for place in range(8) if mask >> place & 1]

    def _place_of_value(self, row: int, eight: int, slot: int) -> tuple[int, bool]:
        """The byte of a value, and whether it is in the upper four bits."""
        if self.isa in LANES:
            half = EIGHTS // 2
            return (eight % half * self.rows + row) * KEPT_OF_EIGHT + slot, eight >= half
        if self.isa in SLOTS:
            half = KEPT_OF_EIGHT // 2
            return slot % half * INPUTS + row * 8 + eight, slot >= half
        half = self.rows // 2
        return row % half * (INPUTS // 2) + KEPT_OF_EIGHT * eight + slot, row >= half


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


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 64), (13, 72), (20, 200)])
def test_the_bytes_are_those_of_the_layout(isa: str, n: int, k: int, pattern: str) -> None:
    layer = to_int4(random_layer(n, k, pattern, permuted=False, zeros=n == 20))
    packed = CpuBackend(isa).pack(layer.weights)
    assert packed.four_bits
    expected = packing.unpack(layer.weights.values, layer.weights.mask)
    assert torch.equal(unpacked(packed.packed, isa, n, k, pattern), expected.long())


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(("n", "k"), [(3, 8), (13, 72)])
def test_the_sums_of_values_stand_behind_the_blocks(isa: str, n: int, k: int, pattern: str) -> None:
    layer, block = to_int4(random_layer(n, k, pattern, permuted=False)), Block(isa, pattern)
    groups, blocks = -(-n // block.rows), -(-k // INPUTS)
    start = groups * blocks * block.bytes
    packed = CpuBackend(isa).pack(layer.weights).packed
    sums = packed[start : start + groups * block.rows * SUM_BYTES].clone().view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()
