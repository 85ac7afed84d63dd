"""int8 values that fit 4 bits: held in these where kernels read them, and multiplied as int8."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import KEPT, random_layer, to_int4, to_int8
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint import packing
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import Case, cases, on_each_with_lanes
from tests.kernels.test_cpu import exact, run
from tests.kernels.test_int8 import LARGE_TOKENS, ROUNDING, TOKENS, TOLERANCE
from tests.kernels.test_lanes import EIGHTS, INPUTS, ROWS, SLOTS, place_of, value_type

TYPES = {"2:4": 9, "4:8": 10}
"""In the metadata, as csrc/cpu/packing/layout.h numbers them."""
INT8_TYPES = {"2:4": 6, "4:8": 8}


def weights_of(values: Tensor, mask: Tensor, pattern: str = "2:4") -> CheckpointWeights:
    scale = torch.rand(len(values)) + 0.5
    return CheckpointWeights(values, mask, None, scale, Pattern.parse(pattern), 64)


def block_bytes(pattern: str) -> tuple[int, int]:
    """Bytes of the places of a block, and of all of it."""
    places = (3 if pattern == "4:8" else 2) * ROWS * SLOTS
    return places, places + EIGHTS // 2 * ROWS * SLOTS


def unpacked(packed: Tensor, n: int, k: int, pattern: str) -> Tensor:
    """Values times mask, `[n, k]`, read byte by byte as csrc/cpu/packing/layout.h says."""
    blocks, groups = -(-k // INPUTS), -(-n // ROWS)
    start_of_values, size = block_bytes(pattern)
    multipliers = packed[groups * (blocks * size + 4 * ROWS) :]
    dense = torch.zeros(n, k, dtype=torch.int64)
    for row in range(n):
        for block in range(blocks):
            place_of_block = row // ROWS * blocks + block
            own = packed[place_of_block * size :][:size]
            multiplier = int(multipliers[place_of_block * ROWS + row % ROWS])
            for eight in range(EIGHTS):
                for slot in range(SLOTS):
                    at = (eight % 4 * ROWS + row % ROWS) * SLOTS + slot
                    quotient = (int(own[start_of_values + at]) >> 4 * (eight // 4) & 15) - 8
                    place = place_of(own, row, eight, slot, pattern)
                    column = block * INPUTS + 8 * eight + place
                    if column < k:
                        dense[row, column] += quotient * multiplier
                    else:
                        assert quotient == 0
    return dense


@on_each_with_lanes
@pytest.mark.parametrize("pattern", TYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (8, 64), (13, 72), (20, 200)])
def test_the_bytes_are_those_of_the_layout(isa, n, k, pattern):
    layer = to_int4(random_layer(n, k, pattern, permuted=False, zeros=n == 20))
    packed = CpuBackend(isa).pack(layer.weights)
    assert packed.four_bits
    assert value_type(packed) == TYPES[pattern]
    expected = packing.unpack(layer.weights.values, layer.weights.mask)
    assert torch.equal(unpacked(packed.packed, n, k, pattern), expected.long())


@on_each_with_lanes
@pytest.mark.parametrize("pattern", TYPES)
@pytest.mark.parametrize(("n", "k"), [(3, 8), (13, 72)])
def test_the_sums_of_values_stand_behind_the_blocks(isa, n, k, pattern):
    layer = to_int4(random_layer(n, k, pattern, permuted=False))
    groups, blocks = -(-n // ROWS), -(-k // INPUTS)
    start = groups * blocks * block_bytes(pattern)[1]
    packed = CpuBackend(isa).pack(layer.weights).packed
    sums = packed[start : start + groups * ROWS * 4].view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()


@on_each_with_lanes
@pytest.mark.parametrize("pattern", TYPES)
def test_one_value_that_does_not_fit_leaves_all_in_8_bits(isa, pattern):
    n, k = 20, 200
    layer = to_int4(random_layer(n, k, pattern, permuted=False))
    assert value_type(CpuBackend(isa).pack(layer.weights)) == TYPES[pattern]
    layer.weights.values[n - 1, -2:] = torch.tensor([127, 1])
    packed = CpuBackend(isa).pack(layer.weights)
    assert not packed.four_bits
    assert value_type(packed) == INT8_TYPES[pattern]


@on_each_with_lanes
def test_bytes_of_a_layer(isa):
    """Three fifths of those of int8 values, a fifth of those of the dense bfloat16 weight."""
    layer = random_layer(512, 1024)
    sizes = [CpuBackend(isa).pack(of(layer).weights).packed.numel() for of in (to_int4, to_int8)]
    assert sizes[0] <= 0.63 * sizes[1]
    assert sizes[0] <= 0.2 * 512 * 1024 * 2


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_float64(case: Case, isa: str, dtype: torch.dtype) -> None:
    layer = to_int4(case.layer())
    for m in LARGE_TOKENS if case.n * case.k > 60_000 else TOKENS:
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(dtype)
        y, reference = run(layer, isa, x), exact(x, layer)
        assert y.dtype == dtype
        if y.numel() >= 256 and case.k >= 64:
            assert (y.double() - reference).norm() <= TOLERANCE * reference.norm()
        # No activation is off by more than half a step of 8 bits, no output by more than its
        # rounding, or that of its weights to bfloat16 where no kernel takes integers.
        step = x.double().abs().amax(dim=-1, keepdim=True) / 127
        weights = layer.dense.double().abs().sum(dim=1)
        bound = 0.501 * step * weights + ROUNDING[dtype] * reference.abs() + 1e-6
        assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("pattern", TYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40, 70, 300])
def test_float32_meets_them_as_they_are(isa, m, pattern):
    layer = to_int4(random_layer(43, 200, pattern, permuted=False))
    backend = CpuBackend(isa, torch.float32)
    x = torch.randn(m, 200)
    packed = backend.pack(layer.weights)
    y = torch.ops.permllm.sparse_linear(
        x, packed.packed, packed.metadata, None, packed.scale, None, 43, pattern
    )
    assert (y.double() - exact(x, layer)).norm() <= 1e-6 * exact(x, layer).norm()


@on_each_with_lanes
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 10, 24, 64])
def test_integer_activations_are_exact(isa, m, dtype):
    """Integers up to 127 quantize to themselves: the sums are those of integer arithmetic."""
    generator = torch.Generator().manual_seed(m)
    n, k = 43, 200
    layer = random_layer(n, k, permuted=False)
    multipliers = torch.randint(1, 17, (n, -(-k // 64)), generator=generator)
    quotients = torch.randint(-8, 8, (n, k // 2), generator=generator)
    values = quotients * multipliers.repeat_interleave(KEPT, dim=1)[:, : k // 2]
    weights = weights_of(values.to(torch.int8), layer.weights.mask)
    packed = CpuBackend(isa).pack(weights)
    assert value_type(packed) == TYPES["2:4"]
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, 3] = 127
    sums = (x.double() @ packing.unpack(values, weights.mask).double().t()).float()
    y = torch.ops.permllm.sparse_linear(
        x.to(dtype), packed.packed, packed.metadata, None, packed.scale, None, n, "2:4"
    )
    assert torch.equal(y, (sums * weights.scale).to(dtype))


@on_each_with_lanes
@pytest.mark.parametrize("m", [1, 5, 17])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("other", [-16, 112])
def test_the_sums_of_a_block_have_room(isa, m, sign, other):
    """All but one of the values are the smallest, -8 times 16, and x is as large as it can be."""
    n, k = 9, 1 << 17
    values = torch.full((n, k // 2), -128, dtype=torch.int8)
    values[:, ::KEPT] = other
    weights = weights_of(values, torch.full((n, k // 8), 0x33, dtype=torch.uint8))
    packed = CpuBackend(isa).pack(weights)
    assert value_type(packed) == TYPES["2:4"]
    x = torch.full((m, k), sign).bfloat16()
    y = torch.ops.permllm.sparse_linear(
        x, packed.packed, packed.metadata, None, packed.scale, None, n, "2:4"
    )
    expected = (sign * values.double().sum(dim=1)).float() * weights.scale
    assert torch.equal(y, expected.bfloat16().expand(m, n))
