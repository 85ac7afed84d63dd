"""Blocks in lanes, where a lane is a row: which layers take which, and what their bytes say."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import PackedWeights
from permllm_vllm.checkpoint import packing
from tests.kernels.cases import on_each_with_lanes

VALUE_TYPE = 5
"""Place in the metadata, as csrc/cpu/packing/layout.h numbers them."""
TYPES = {
    ("2:4", torch.bfloat16): 5,
    ("2:4", torch.int8): 6,
    ("4:8", torch.bfloat16): 7,
    ("4:8", torch.int8): 8,
}
ROWS, INPUTS, EIGHTS, SLOTS = 8, 64, 8, 4
EVERY_KERNEL = (1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 40, 64, 100)

pytestmark = on_each_with_lanes


def drawn(n: int, k: int, pattern: str, dtype: torch.dtype) -> Layer:
    layer = random_layer(n, k, pattern, permuted=False, bias=True)
    return to_int8(layer) if dtype == torch.int8 else layer


def value_type(packed: PackedWeights) -> int:
    assert packed.metadata is not None
    return int(packed.metadata[VALUE_TYPE])


def place_of(block: Tensor, row: int, eight: int, slot: int, pattern: str) -> int:
    """Which of its eight inputs a value of a row meets, as the bytes of a block say."""
    byte = row % ROWS * SLOTS + slot
    place = int(block[eight // 4 * ROWS * SLOTS + byte]) >> 2 * (eight % 4) & 3
    if pattern == "4:8":
        return place + 4 * (int(block[2 * ROWS * SLOTS + byte]) >> eight & 1)
    return place + 4 * (slot // 2)


def unpacked(packed: Tensor, n: int, k: int, pattern: str, dtype: torch.dtype) -> Tensor:
    """Values times mask, `[n, k]`, read byte by byte as csrc/cpu/packing/layout.h says."""
    blocks, width = -(-k // INPUTS), dtype.itemsize
    fours = ROWS * SLOTS if pattern == "4:8" else 0
    block_bytes = 2 * ROWS * SLOTS + fours + EIGHTS * ROWS * SLOTS * width
    dense = torch.zeros(n, k, dtype=dtype)
    for row in range(n):
        for block in range(blocks):
            start = (row // ROWS * blocks + block) * block_bytes
            own = packed[start : start + block_bytes]
            values = own[2 * ROWS * SLOTS + fours :].view(dtype)
            for eight in range(EIGHTS):
                for slot in range(SLOTS):
                    if dtype == torch.int8:
                        at = (eight * ROWS + row % ROWS) * SLOTS + slot
                    else:
                        at = ((eight * 2 + slot // 2) * ROWS + row % ROWS) * 2 + slot % 2
                    place = place_of(own, row, eight, slot, pattern)
                    column = block * INPUTS + 8 * eight + place
                    if column < k:
                        dense[row, column] += values[at]
                    else:
                        assert values[at] == 0
    return dense


@pytest.mark.parametrize(("pattern", "dtype"), TYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 64), (13, 72), (20, 200)])
def test_the_bytes_are_those_of_the_layout(isa, n, k, pattern, dtype):
    layer = drawn(n, k, pattern, dtype)
    packed = CpuBackend(isa).pack(layer.weights)
    assert value_type(packed) == TYPES[pattern, dtype]
    expected = packing.unpack(layer.weights.values, layer.weights.mask)
    assert torch.equal(unpacked(packed.packed, n, k, pattern, dtype), expected)


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize(("n", "k"), [(3, 8), (13, 72), (20, 200)])
def test_the_sums_of_int8_values_stand_behind_the_blocks(isa, n, k, pattern):
    layer = drawn(n, k, pattern, torch.int8)
    row_bytes = (3 if pattern == "4:8" else 2) * SLOTS + EIGHTS * SLOTS
    groups = -(-n // ROWS)
    start = groups * -(-k // INPUTS) * ROWS * row_bytes
    packed = CpuBackend(isa).pack(layer.weights).packed
    sums = packed[start : start + groups * ROWS * 4].view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_mask_says_which_pattern_it_has(isa, dtype):
    """A 4:8 layer that is 2:4 is taken for that; one row that is not makes the difference."""
    n, k = 24, 136
    layer = drawn(n, k, "2:4", dtype)
    assert value_type(CpuBackend(isa).pack(layer.weights)) == TYPES["2:4", dtype]
    layer.weights.mask[n - 1, k // 8 - 1] = 0b00001111
    assert value_type(CpuBackend(isa).pack(layer.weights)) == TYPES["4:8", dtype]


def test_no_damage_of_places_is_read_as_an_address(isa):
    """Any bytes name inputs of their block: where these are all alike, the result is the same."""
    for pattern, dtype in TYPES:
        layer = drawn(16, 128, pattern, dtype)
        packed = CpuBackend(isa).pack(layer.weights)
        fours = ROWS * SLOTS if pattern == "4:8" else 0
        places, values = 2 * ROWS * SLOTS + fours, EIGHTS * ROWS * SLOTS * dtype.itemsize
        blocks = packed.packed[: 4 * (places + values)].view(4, places + values)
        x = [torch.ones(tokens, 128, dtype=torch.bfloat16) for tokens in EVERY_KERNEL]
        operands = packed.packed, packed.metadata, None, packed.scale, None, 16, pattern
        expected = [torch.ops.permllm.sparse_linear(one, *operands) for one in x]
        blocks[:, :places] = 0xFF
        for one, sound in zip(x, expected, strict=True):
            assert torch.equal(torch.ops.permllm.sparse_linear(one, *operands), sound)
