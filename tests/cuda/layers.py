"""Random 2:4 layers, a reader of the packed format in plain loops, and how exact products are."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.shapes import Layer, random_layer
from permllm_vllm.backends import CheckpointWeights, PackedWeights
from permllm_vllm.backends.reference import ReferenceBackend

WIDE = 6272
"""49 tiles of 128 rows: an odd number, where clusters of CUTLASS' GEMM take two."""

PRODUCTS = (
    (1, 8, 0, False),
    (128, 128, 64, True),
    (100, 176, 0, True),
    (136, 576, 64, False),
    (72, 416, 32, True),
    (129, 1152, 128, True),
    (1024, 4096, 64, False),
    (2048, 2056, 0, True),
    (512, 11008, 64, True),
    (WIDE, 256, 64, True),
)
"""Outputs, inputs, block size of the permutation or 0, and whether there is a bias."""

TOKENS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 100, 128, 129, 300, 1000)


TOLERANCE = {torch.bfloat16: 3e-3, torch.float16: 6e-4}  # the rounding of y gives most of it
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # half a unit in the last place
ENOUGH = 64  # results over which roundings average out: of one alone, its own may be the error
SUMS = 2**-14  # of sums in float32, of the sum of all magnitudes
SMALLEST = 2**-24  # of float16


def int8_layer(n: int, k: int, **options) -> Layer:
    """A layer with int8 values, the smallest and the largest among them, and a scale; float64."""
    layer = random_layer(n, k, **options)
    generator = torch.Generator().manual_seed(n + k)
    shape = layer.weights.values.shape
    values = torch.randint(-128, 128, shape, generator=generator).to(torch.int8)
    scale = torch.rand(n, generator=generator) / 64 + 1 / 64
    exact = values.double() * scale.double()[:, None]
    weights = replace(layer.weights, values=values, scale=scale)
    dense = ReferenceBackend(torch.float64).pack(replace(weights, values=exact, scale=None)).packed
    return Layer(weights, dense, layer.bias)


def replace(weights: CheckpointWeights, **changes) -> CheckpointWeights:
    return CheckpointWeights(**{**vars(weights), **changes})


def metadata_byte(m: int, k: int, padded_rows: int) -> int:
    """The formula at the top of csrc/cuda/format.h."""
    return (
        (k % 16) // 8
        + 2 * ((m // 8) % 2)
        + 4 * ((k // 32) % 4)
        + 16 * (m % 8)
        + 128 * ((k // 16) % 2)
        + 256 * ((m // 16) % 4)
        + 1024 * (m // 64)
        + 16 * padded_rows * (k // 128)
    )


def places(metadata: Tensor, m: int, k: int, padded_rows: int) -> tuple[int, int]:
    """Places of the kept values of the group of inputs k .. k + 3 of row m."""
    byte = int(metadata.flatten()[metadata_byte(m, k, padded_rows)])
    nibble = byte >> 4 if k % 8 else byte & 15
    return nibble & 3, nibble >> 2


def decode(packed: PackedWeights, n: int, k: int) -> Tensor:
    """The dense weight [n, k] in the original input order, without the scale."""
    values, metadata = packed.packed, packed.metadata
    padded_rows, columns = values.shape
    permuted = torch.zeros(padded_rows, columns * 2, dtype=values.dtype)
    for m in range(padded_rows):
        for group in range(columns // 2):
            first, second = places(metadata, m, group * 4, padded_rows)
            assert first < second
            column = group * 2
            if values.dtype == torch.int8:
                inside = (0, 4, 1, 5, 2, 6, 3, 7).index(group % 8)
                column = (group // 8 * 8 + inside) * 2
            permuted[m, group * 4 + first] = values[m, column]
            permuted[m, group * 4 + second] = values[m, column + 1]
    assert not permuted[n:].any()
    assert not permuted[:, k:].any()
    dense = permuted.clone()
    if packed.permutation is not None:
        for j, place in enumerate(packed.permutation.tolist()):
            dense[:, j - j % 128 + place] = permuted[:, j]
    return dense[:n, :k]


def assert_right(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None) -> None:
    """Compare y with the product of x and a dense weight in float64."""
    exact = x.double() @ dense.t()
    if bias is not None:
        exact = exact + bias.double()
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    assert y.isfinite().all()
    if y.numel() >= ENOUGH:
        error = (y.double() - exact).norm() / exact.norm().clamp_min(1e-30)
        assert error < TOLERANCE[x.dtype], f"relative Frobenius error {error:.2e}"
    size = x.double().abs() @ dense.abs().t()
    bound = ROUNDING[x.dtype] * exact.abs() + SUMS * size + SMALLEST
    assert ((y.double() - exact).abs() <= bound).all()
