"""Blocks in lanes, where a lane is a row: which layers take which, and what their bytes say.

Layers of any 32 of 64 inputs are in blocks with masks, of which test_loose_masks.py tells.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import PackedWeights
from permllm_vllm.checkpoint import packing
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import on_each_with_lanes

VALUE_TYPE = 5
"""Place in the metadata, as csrc/cpu/packing/layout.h numbers them."""
TYPES = {
    ("2:4", torch.bfloat16): 5,
    ("2:4", torch.int8): 6,
    ("4:8", torch.bfloat16): 7,
    ("4:8", torch.int8): 8,
    ("8:16", torch.bfloat16): 7,
    ("8:16", torch.int8): 8,
}
MASKED_TYPES = {torch.bfloat16: 0, torch.int8: 1}
"""Of blocks with masks, which are not in lanes."""
PATTERNS = ("2:4", "4:8", "8:16")
ROWS, INPUTS, FOURS, VALUES = 8, 64, 8, 4
SHAPES = ((3, 8), (8, 64), (13, 72), (20, 200))
EVERY_KERNEL = (1, 2, 3, 4, 8, 9, 16, 17, 32, 33, 40, 64, 100)

pytestmark = on_each_with_lanes


def drawn(n: int, k: int, pattern: str, dtype: torch.dtype) -> Layer:
    layer = random_layer(n, k, pattern, permuted=False, bias=True)
    return to_int8(layer) if dtype == torch.int8 else layer


def value_type(packed: PackedWeights) -> int:
    assert packed.metadata is not None
    return int(packed.metadata[VALUE_TYPE])


def fitting(n: int, k: int, pattern: str) -> tuple[int, int]:
    """The shape with whole groups of inputs."""
    group = Pattern.parse(pattern).group
    return n, -(-k // group) * group


def place_bytes(pattern: str) -> int:
    """Of a block, before its values."""
    return (2 if pattern == "2:4" else 4) * ROWS * VALUES


def input_of(block: Tensor, row: int, value: int, pattern: str) -> int:
    """Which input of its block a value of a row meets, as the bytes of the block say."""
    four, byte = value // VALUES, row % ROWS * VALUES + value % VALUES
    if pattern == "2:4":
        place = int(block[four // 4 * ROWS * VALUES + byte]) >> 2 * (four % 4) & 3
        return value // 2 * 4 + place
    place = int(block[four // 2 * ROWS * VALUES + byte]) >> 4 * (four % 2) & 15
    return value // 8 * 16 + value % 8 + place


def unpacked(packed: Tensor, n: int, k: int, pattern: str, dtype: torch.dtype) -> Tensor:
    """Values times mask, `[n, k]`, read byte by byte as csrc/cpu/packing/layout.h says."""
    blocks, width = -(-k // INPUTS), dtype.itemsize
    block_bytes = place_bytes(pattern) + FOURS * ROWS * VALUES * width
    dense = torch.zeros(n, k, dtype=dtype)
    for row in range(n):
        for block in range(blocks):
            start = (row // ROWS * blocks + block) * block_bytes
            own = packed[start : start + block_bytes]
            values = own[place_bytes(pattern) :].view(dtype)
            for value in range(FOURS * VALUES):
                four, i = value // VALUES, value % VALUES
                if dtype == torch.int8:
                    at = (four * ROWS + row % ROWS) * VALUES + i
                else:
                    at = ((four * 2 + i // 2) * ROWS + row % ROWS) * 2 + i % 2
                column = block * INPUTS + input_of(own, row, value, pattern)
                if column < k:
                    dense[row, column] += values[at]
                else:
                    assert values[at] == 0
    return dense


@pytest.mark.parametrize(("pattern", "dtype"), TYPES)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_bytes_are_those_of_the_layout(isa, n, k, pattern, dtype):
    n, k = fitting(n, k, pattern)
    layer = drawn(n, k, pattern, dtype)
    packed = CpuBackend(isa).pack(layer.weights)
    assert value_type(packed) == TYPES[pattern, dtype]
    expected = packing.unpack(layer.weights.values, layer.weights.mask)
    assert torch.equal(unpacked(packed.packed, n, k, pattern, dtype), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_the_sums_of_int8_values_stand_behind_the_blocks(isa, n, k, pattern):
    n, k = fitting(n, k, pattern)
    layer = drawn(n, k, pattern, torch.int8)
    block_bytes = place_bytes(pattern) + FOURS * ROWS * VALUES
    groups = -(-n // ROWS)
    start = groups * -(-k // INPUTS) * block_bytes
    packed = CpuBackend(isa).pack(layer.weights).packed
    sums = packed[start : start + groups * ROWS * 4].view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_a_mask_says_which_pattern_it_has(isa, dtype):
    """A 32:64 layer that is 2:4 is taken for that; one row that is not makes the difference."""
    n, k = 24, 192
    layer = drawn(n, k, "2:4", dtype)
    weights = replace(layer.weights, pattern=Pattern.parse("32:64"))
    assert value_type(CpuBackend(isa).pack(weights)) == TYPES["2:4", dtype]
    weights.mask[n - 1, -2:] = torch.tensor([0x0F, 0x33], dtype=torch.uint8)
    assert value_type(CpuBackend(isa).pack(weights)) == TYPES["4:8", dtype]
    weights.mask[n - 1, -2:] = torch.tensor([0xFF, 0x00], dtype=torch.uint8)
    assert value_type(CpuBackend(isa).pack(weights)) == TYPES["8:16", dtype]
    weights.mask[n - 1, -4:] = torch.tensor([0xFF, 0x0F, 0x0F, 0x00], dtype=torch.uint8)
    assert value_type(CpuBackend(isa).pack(weights)) == MASKED_TYPES[dtype]


def test_no_damage_of_places_is_read_as_an_address(isa):
    """Any bytes name inputs of their block: where these are all alike, the result is the same."""
    for pattern, dtype in TYPES:
        layer = drawn(16, 128, pattern, dtype)
        packed = CpuBackend(isa).pack(layer.weights)
        places, values = place_bytes(pattern), FOURS * ROWS * VALUES * dtype.itemsize
        blocks = packed.packed[: 4 * (places + values)].view(4, places + values)
        x = [torch.ones(tokens, 128, dtype=torch.bfloat16) for tokens in EVERY_KERNEL]
        operands = packed.packed, packed.metadata, None, packed.scale, None, 16, pattern
        expected = [torch.ops.permllm.sparse_linear(one, *operands) for one in x]
        blocks[:, :places] = 0xFF
        for one, sound in zip(x, expected, strict=True):
            assert torch.equal(torch.ops.permllm.sparse_linear(one, *operands), sound)
