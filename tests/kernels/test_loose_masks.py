"""Rows that keep any half of 16, 32 or 64 inputs, on every instruction set that takes them.

The oracle is a loop over the bits of the mask.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer, to_int4, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import INT8_ONLY, CpuBackend
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import LANES, TWELVE_BITS

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
PATTERNS = ("8:16", "32:64")
SHAPES = ((1, 64), (8, 128), (13, 192), (40, 1088))
EVERY_KERNEL = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 17, 31, 33, 40, 64, 100)
STEP = 0.501 / 127
"""Of activations that are rounded to 8 bits, of the largest of their token."""


def dense_by_loops(weights: CheckpointWeights) -> Tensor:
    """The weight in permuted order, float64, by the format's definition."""
    rows, columns = weights.values.shape[0], weights.values.shape[1] * 2
    values, mask = weights.values.double().tolist(), weights.mask.tolist()
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        kept = [j for j in range(columns) if mask[row][j // 8] >> (j % 8) & 1]
        assert len(kept) == columns // 2
        for j, value in zip(kept, values[row], strict=True):
            dense[row, j] = value
    return dense if weights.scale is None else dense * weights.scale.double()[:, None]


def product(layer: Layer, isa: str, x: Tensor) -> Tensor:
    packed = CpuBackend(isa, x.dtype).pack(layer.weights)
    return ops.sparse_linear(
        x,
        packed.packed,
        packed.metadata,
        packed.permutation,
        packed.scale,
        None if layer.bias is None else layer.bias.to(x.dtype),
        layer.dense.shape[0],
        str(layer.weights.pattern),
    )


def of_values(layer: Layer, values: str) -> Layer:
    return {
        "bfloat16": lambda: layer,
        "int8": lambda: to_int8(layer),
        "int4": lambda: to_int4(layer),
    }[values]()


def with_extreme_masks(n: int, k: int) -> Layer:
    """Rows that keep one end of every 64 inputs, of every 16, or every other input."""
    layer = random_layer(n, k, "32:64", permuted=False)
    rows = ("ffffffff00000000", "00000000ffffffff", "ff00ff00ff00ff00", "00ff00ff00ff00ff",
            "5555555555555555", "ff00000000ffffff", "00ffffffff000000")  # fmt: skip
    for row in range(n):
        mask = bytes.fromhex(rows[row % len(rows)]) * (k // 64)
        layer.weights.mask[row] = torch.tensor(list(mask), dtype=torch.uint8)
    return layer


@pytest.mark.parametrize("values", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("pattern", [*PATTERNS, "extreme"])
def test_matches_a_loop_over_the_masks(isa, pattern, dtype, values):
    for n, k in SHAPES:
        if pattern == "extreme":
            layer = with_extreme_masks(n, k)
        else:
            layer = random_layer(n, k, pattern, permuted=False, bias=n == 13, zeros=n == 40)
        layer = of_values(layer, values)
        dense = dense_by_loops(layer.weights)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        for m in EVERY_KERNEL:
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
            y, reference = product(layer, isa, x), x.double() @ dense.t() + bias
            size = x.double().abs() @ dense.t().abs()
            bound = torch.finfo(dtype).eps * reference.abs() + 2**-18 * size + 1e-6
            if dtype != torch.float32:
                bound += 2**-8 * size  # float16 that is rounded to bfloat16, or the reverse
                if values != "bfloat16":
                    step = STEP * x.double().abs().amax(dim=-1, keepdim=True)
                    bound += step * dense.abs().sum(dim=1)
            assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("pattern", [*PATTERNS, "extreme"])
def test_every_weight_is_exact(isa, pattern):
    """Unit inputs read the weight itself, for few and many tokens."""
    n, k = 43, 256
    layer = (
        with_extreme_masks(n, k)
        if pattern == "extreme"
        else random_layer(n, k, pattern, permuted=False)
    )
    inputs, weight = torch.eye(k).bfloat16(), dense_by_loops(layer.weights).t().bfloat16()
    for m in (1, 3, 7, 20, k):
        for first in range(0, k, m):
            own = slice(first, first + m)
            assert torch.equal(product(layer, isa, inputs[own]), weight[own])
            if first > 100:
                break


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_permutation_is_gathered_or_undone(isa, pattern):
    for block_size in (64, 128):
        layer = random_layer(24, 256, pattern, block_size)
        y = product(layer, isa, torch.eye(256).bfloat16())
        assert torch.equal(y, layer.dense.t())


@pytest.mark.parametrize("isa", LANES)
@pytest.mark.parametrize("integers", [to_int8, to_int4])
def test_int8_values_of_any_32_of_64_meet_x_as_it_is(isa, integers):
    layer = integers(random_layer(40, 192, "32:64", permuted=False))
    x = torch.randn(5, 192).bfloat16()
    reference = x.double() @ dense_by_loops(layer.weights).t()
    size = x.double().abs() @ dense_by_loops(layer.weights).abs().t()
    error = (product(layer, isa, x).double() - reference).abs()
    assert (error <= 2**-8 * reference.abs() + 2**-20 * size).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_no_damage_of_masks_is_read_as_an_address(isa, dtype):
    """Rows whose damaged masks keep all inputs, or none, have some answer."""
    if isa in TWELVE_BITS or isa in INT8_ONLY:
        pytest.skip(f"{isa} expands masks: test_damage.py")
    layer = random_layer(16, 128, "32:64", permuted=False)
    layer = to_int8(layer) if dtype == torch.int8 else layer
    packed = CpuBackend(isa).pack(layer.weights)
    for byte in (0x00, 0xFF, 0x01):
        packed.packed[: packed.packed.numel() - 128] = byte
        for m in EVERY_KERNEL:
            x = torch.ones(m, 128, dtype=torch.bfloat16)
            operands = packed.packed, packed.metadata, None, packed.scale, None, 16, "2:4"
            assert ops.sparse_linear(x, *operands).shape == (m, 16)


def test_a_mask_that_keeps_another_number_is_refused(isa):
    layer = random_layer(16, 128, "32:64", permuted=False)
    weights = layer.weights
    weights.mask[11, 9] ^= 1
    assert weights.pattern == Pattern(32, 64)
    with pytest.raises(RuntimeError, match=r"row 11 keeps .* of the inputs .*, not half of them"):
        CpuBackend(isa).pack(weights)
