"""int8 values that fit 4 bits: held in these where kernels read them, and multiplied as int8."""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import KEPT, random_layer, to_int4, to_int8
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.checkpoint import packing
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import (
    GROUPS,
    LANES,
    Case,
    cases,
    on_each_with_four_bits,
    on_each_with_four_bits_and_masks,
)
from tests.kernels.test_cpu import exact, run
from tests.kernels.test_int8 import (
    LARGE_TOKENS,
    ROUNDING,
    SPLIT_TOKENS,
    TOKENS,
    TOLERANCE,
    TOLERANCE_SPLIT,
)
from tests.kernels.test_lanes import value_type

PATTERNS = ("2:4", "4:8", "8:16")
INT8, INT4, GROUPED_INT8, GROUPED_INT4 = 1, 11, 13, 14
"""In the metadata, as csrc/cpu/packing/layout.h numbers them."""
INT8_IN_LANES = {"2:4": 6, "4:8": 8, "8:16": 8}
INT4_IN_LANES = {"2:4": 9, "4:8": 10, "8:16": 10}


def int8_type(isa: str, pattern: str = "2:4") -> int:
    if isa in GROUPS:
        return GROUPED_INT8
    return INT8_IN_LANES[pattern] if isa in LANES else INT8


def int4_type(isa: str, pattern: str = "2:4") -> int:
    if isa in GROUPS:
        return GROUPED_INT4
    return INT4_IN_LANES[pattern] if isa in LANES else INT4


def splits(isa: str, tokens: int) -> bool:
    """Whether x of so many tokens has more than 8 bits."""
    return tokens <= (0 if isa in LANES else SPLIT_TOKENS.get(isa, tokens))


def weights_of(values: Tensor, mask: Tensor, pattern: str = "2:4") -> CheckpointWeights:
    scale = torch.rand(len(values)) + 0.5
    return CheckpointWeights(values, mask, None, scale, Pattern.parse(pattern), 64)


@on_each_with_four_bits
@pytest.mark.parametrize("pattern", PATTERNS)
def test_one_value_that_does_not_fit_leaves_all_in_8_bits(isa, pattern):
    n, k = 20, 208
    layer = to_int4(random_layer(n, k, pattern, permuted=False))
    packed = CpuBackend(isa).pack(layer.weights)
    assert packed.four_bits
    assert value_type(packed) == int4_type(isa, pattern)
    layer.weights.values[n - 1, -2:] = torch.tensor([127, 1])
    packed = CpuBackend(isa).pack(layer.weights)
    assert not packed.four_bits
    assert value_type(packed) == int8_type(isa, pattern)


@on_each_with_four_bits
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
            tolerance = TOLERANCE_SPLIT if splits(isa, m) else TOLERANCE
            assert (y.double() - reference).norm() <= tolerance * reference.norm()
        # No activation is off by more than half a step of 8 bits, no output by more than its
        # rounding, or that of its weights to bfloat16 where no kernel takes integers.
        step = x.double().abs().amax(dim=-1, keepdim=True) / 127
        weights = layer.dense.double().abs().sum(dim=1)
        bound = 0.501 * step * weights + ROUNDING[dtype] * reference.abs() + 1e-6
        assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40, 70, 300])
def test_float32_meets_them_as_they_are(isa, m, pattern):
    layer = to_int4(random_layer(43, 208, pattern, permuted=False))
    backend = CpuBackend(isa, torch.float32)
    x = torch.randn(m, 208)
    packed = backend.pack(layer.weights)
    y = torch.ops.permllm.sparse_linear(
        x, packed.packed, packed.metadata, None, packed.scale, None, 43, pattern
    )
    assert (y.double() - exact(x, layer)).norm() <= 1e-6 * exact(x, layer).norm()


@on_each_with_four_bits
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("m", [1, 2, 3, 10, 24, 64])
def test_integer_activations_are_exact(isa, m, dtype):
    """Integers up to 127 quantize to themselves: the sums are those of integer arithmetic."""
    if splits(isa, m):
        pytest.skip("x has more than 8 bits")
    generator = torch.Generator().manual_seed(m)
    n, k = 43, 200
    layer = random_layer(n, k, permuted=False)
    multipliers = torch.randint(1, 17, (n, -(-k // 64)), generator=generator)
    quotients = torch.randint(-8, 8, (n, k // 2), generator=generator)
    values = quotients * multipliers.repeat_interleave(KEPT, dim=1)[:, : k // 2]
    weights = weights_of(values.to(torch.int8), layer.weights.mask)
    packed = CpuBackend(isa).pack(weights)
    assert packed.four_bits
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, 3] = 127
    sums = (x.double() @ packing.unpack(values, weights.mask).double().t()).float()
    y = torch.ops.permllm.sparse_linear(
        x.to(dtype), packed.packed, packed.metadata, None, packed.scale, None, n, "2:4"
    )
    assert torch.equal(y, (sums * weights.scale).to(dtype))


@on_each_with_four_bits
@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 7, 16, 17, 33, 100])
def test_every_product_that_int8_has(isa, tokens):
    """Row m has all values that are multiples of m + 1, read by unit inputs."""
    n, k = 128, 64
    values = torch.zeros(n, k // 2, dtype=torch.int8)
    for row in range(n):
        products = [q * (row + 1) for q in range(-8, 8) if -128 <= q * (row + 1) <= 127]
        values[row] = torch.tensor((products * KEPT)[:KEPT])
    layer = random_layer(n, k, permuted=False)
    weights = weights_of(values, layer.weights.mask)
    packed = CpuBackend(isa).pack(weights)
    assert packed.four_bits
    scale = torch.ones(n)
    read = [
        torch.ops.permllm.sparse_linear(
            part, packed.packed, packed.metadata, None, scale, None, n, "2:4"
        )
        for part in torch.eye(k).bfloat16().split(tokens)
    ]
    assert torch.equal(torch.cat(read), packing.unpack(values, weights.mask).bfloat16().t())


@on_each_with_four_bits_and_masks
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("m", TOKENS)
def test_the_result_is_that_of_int8(isa, m, permuted, pattern):
    """In every bit: one row that does not fit leaves the others what they are."""
    layer = to_int4(random_layer(43, 320, pattern, permuted=permuted))
    x = torch.randn(m, 320).bfloat16()
    y = run(layer, isa, x)
    layer.weights.values[42, -2:] = torch.tensor([127, 1])
    assert not CpuBackend(isa).pack(layer.weights).four_bits
    assert torch.equal(run(layer, isa, x)[:, :42], y[:, :42])


@on_each_with_four_bits
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
    assert packed.four_bits
    x = torch.full((m, k), sign).bfloat16()
    y = torch.ops.permllm.sparse_linear(
        x, packed.packed, packed.metadata, None, packed.scale, None, n, "2:4"
    )
    expected = (sign * values.double().sum(dim=1)).float() * weights.scale
    assert torch.equal(y, expected.bfloat16().expand(m, n))
