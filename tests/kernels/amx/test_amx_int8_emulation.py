"""The AMX kernels of int8 values on an emulated tile unit, bit by bit against integer sums."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.amx.emulated import (
    NEEDS,
    Emulation,
    from_bf16,
    half_masks,
    pack,
    run,
    to_bf16,
)

pytestmark = NEEDS

SHAPES = [(16, 8), (24, 72), (40, 64), (40, 1376), (272, 200), (272, 512)]
FEW_TOKENS = [1, 3, 4, 5, 8, 9, 15, 16]
MANY_TOKENS = [1, 5, 16, 17, 32, 48, 100, 300]
TOKENS = {"few": FEW_TOKENS, "several": [1, 9, 16, 17, 20, 25, 32], "many": MANY_TOKENS}
CASES = [(kernel, m) for kernel, tokens in TOKENS.items() for m in tokens]
LARGEST = {"few": 32767, "several": 127, "many": 127}  # W8A16, W8A8


def expected(
    kernel: str,
    x: NDArray[np.float64],
    weight: NDArray[np.int8],
    scale: NDArray[np.float32],
    bias: NDArray[np.float64] | None,
) -> NDArray[np.uint16]:
    """Integers of x, one scale per token, summed in int64; float32 where the kernels have it."""
    largest = np.abs(x).max(axis=1, keepdims=True).astype(np.float32)
    integer = np.float32(LARGEST[kernel])
    inverse = np.divide(integer, largest, out=np.zeros_like(largest), where=largest > 0)
    quantized = np.rint(x.astype(np.float32) * inverse).astype(np.int64)
    if kernel == "few":
        upper, lower = quantized >> 8, quantized & 255
        sums = [(part @ weight.T.astype(np.int64)).astype(np.float32) for part in (upper, lower)]
        total = (256.0 * sums[0].astype(np.float64) + sums[1]).astype(np.float32)
    else:
        total = (quantized @ weight.T.astype(np.int64)).astype(np.float32)
    y = total * scale * (largest / integer)
    return to_bf16(y if bias is None else y + bias.astype(np.float32))


def random_weight(
    rng: np.random.Generator, n: int, k: int
) -> tuple[NDArray[np.int8], NDArray[np.uint8]]:
    mask = half_masks(rng, n, k)
    weight = np.where(mask, rng.integers(-128, 128, (n, k)), 0).astype(np.int8)
    return weight, pack(weight, mask)


def check(emulation: Emulation, kernel: str, m: int, n: int, k: int, bias: bool, gap: int) -> None:
    rng = np.random.default_rng([m, n, k])
    weight, packed = random_weight(rng, n, k)
    x = from_bf16(to_bf16(rng.normal(size=(m, k))))
    x[0, : k // 2] = 0.0
    scale = rng.uniform(0.5, 2.0, n).astype(np.float32)
    added = from_bf16(to_bf16(rng.normal(size=n))) if bias else None
    got = run(emulation, kernel, x, packed, n, added, gap, scale=scale)
    np.testing.assert_array_equal(
        from_bf16(got),
        from_bf16(expected(kernel, x, weight, scale, added)),
        f"{kernel=} {m=} {n=} {k=} {bias=} {gap=}",
    )


@pytest.mark.parametrize(("kernel", "m"), CASES)
def test_equals_integer_sums(emulation, kernel: str, m: int) -> None:
    emulation.set_threads(1)
    for case, (n, k) in enumerate(SHAPES, start=m):
        check(emulation, kernel, m, n, k, bias=case % 2 == 0, gap=24 * (case // 2 % 2))


@pytest.mark.parametrize("in_turn", [False, True])
def test_equals_integer_sums_on_many_threads(emulation, in_turn: bool) -> None:
    emulation.set_threads(3, in_turn)
    for kernel, m in [("few", 1), ("few", 16), ("several", 17), ("many", 48), ("many", 300)]:
        check(emulation, kernel, m, 272, 1376, bias=True, gap=8)


def test_more_tokens_than_are_packed_at_once(emulation) -> None:
    emulation.set_threads(2)
    check(emulation, "many", 1100, 24, 72, bias=True, gap=8)


@pytest.mark.parametrize("kernel", TOKENS)
def test_tokens_of_zeros_and_of_no_number_disturb_no_other(emulation, kernel: str) -> None:
    emulation.set_threads(1)
    rng = np.random.default_rng(0)
    weight, packed = random_weight(rng, 40, 72)
    x = from_bf16(to_bf16(rng.normal(size=(6, 72))))
    x[1] = 0.0
    scale = np.ones(40, np.float32)
    want = from_bf16(expected(kernel, x, weight, scale, None))
    assert (want[1] == 0).all()
    x[3, 5], x[4, 70] = np.inf, np.nan
    got = from_bf16(run(emulation, kernel, x, packed, 40, None, gap=0, scale=scale))
    assert not np.isfinite(got[3:5]).any()
    np.testing.assert_array_equal(got[[0, 1, 2, 5]], want[[0, 1, 2, 5]])


@pytest.mark.parametrize("kernel", TOKENS)
def test_largest_sums_fit(emulation, kernel: str) -> None:
    """Every value and every activation at its extreme, for the most inputs that are packed."""
    emulation.set_threads(1)
    k = 1 << 17
    mask = np.tile([True, True, False, False], (16, k // 4))
    weight = np.where(mask, -128, 0).astype(np.int8)
    scale = np.full(16, 2.0**-20, np.float32)
    for value in (1.0, -1.0):
        x = np.full((1, k), value)
        got = run(emulation, kernel, x, pack(weight, mask), 16, None, gap=0, scale=scale)
        np.testing.assert_array_equal(got, expected(kernel, x, weight, scale, None))


@pytest.mark.parametrize("signed", [True, False])
def test_emulated_multiply_add_of_bytes(emulation, signed: bool) -> None:
    rng = np.random.default_rng(int(signed))
    a = rng.integers(-128, 128, (16, 64)).astype(np.int8)
    b = rng.integers(-128 if signed else 0, 128 if signed else 256, (16, 16, 4))
    b = b.astype(np.int8 if signed else np.uint8)
    c = rng.integers(-1000, 1000, (16, 16)).astype(np.int32)
    inputs = b.transpose(0, 2, 1).reshape(64, 16)
    want = c + a.astype(np.int32) @ inputs.astype(np.int32)
    emulation.library.multiply_add_bytes(signed, c.ctypes.data, a.ctypes.data, b.ctypes.data)
    assert emulation.violation() == ""
    np.testing.assert_array_equal(c, want)
    assert emulation.library.take_multiply_adds() == 1
