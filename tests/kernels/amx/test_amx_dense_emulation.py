"""The AMX kernel of the dense head on an emulated tile unit, against exact sums in float64."""

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.kernels.amx.emulated import (
    NAN,
    NEEDS,
    UNTOUCHED,
    Emulation,
    GuardedMemory,
    from_bf16,
    to_bf16,
)

pytestmark = NEEDS

TOKENS = [1, 4, 5, 8, 9, 16, 17, 32, 33, 48, 49, 64]
OUTPUTS = [1, 16, 47, 256, 263, 530]
"""Groups have 256 rows, tiles 16, and both have remainders."""
INPUTS = [32, 64, 96, 1088]


def run(
    emulation: Emulation, x: NDArray[np.float64], weight: NDArray[np.float64], gap: int = 0
) -> NDArray[np.float64]:
    """Rows of x `gap` elements apart with NaN between them; memory is guarded behind its end."""
    (m, k), n = x.shape, len(weight)
    rows = np.full((m, k + gap), NAN, np.uint16)
    rows[:, :k] = to_bf16(x)
    x_bits = rows.reshape(-1)[: m * (k + gap) - gap]
    y = np.full(m * n + 128, UNTOUCHED, np.uint16)
    y[64:-64] = NAN
    with (
        GuardedMemory(x_bits.view(np.uint8)) as x_address,
        GuardedMemory(to_bf16(weight).reshape(-1).view(np.uint8)) as weight_address,
    ):
        emulation.library.run_dense(x_address, k + gap, m, weight_address, n, k, y[64:].ctypes.data)
    assert emulation.violation() == ""
    assert emulation.library.configured_units() == 0
    assert (y[:64] == UNTOUCHED).all()
    assert (y[-64:] == UNTOUCHED).all()
    return from_bf16(y[64:-64].reshape(m, n))


def integers(m: int, n: int, k: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """x and a weight whose products have exact sums in any order."""
    rng = np.random.default_rng([m, n, k])
    return tuple(rng.integers(-8, 9, (rows, k)).astype(np.float64) for rows in (m, n))


@pytest.mark.parametrize("m", TOKENS)
@pytest.mark.parametrize("n", OUTPUTS)
def test_equals_exact_sums(emulation: Emulation, m: int, n: int) -> None:
    emulation.set_threads(1)
    for k in INPUTS:
        x, weight = integers(m, n, k)
        expected = from_bf16(to_bf16(x @ weight.T))
        np.testing.assert_array_equal(run(emulation, x, weight, gap=k % 3 * 8), expected)


@pytest.mark.parametrize("threads", [2, 5])
@pytest.mark.parametrize("in_turn", [False, True])
def test_threads_change_no_bit(emulation: Emulation, threads: int, in_turn: bool) -> None:
    rng = np.random.default_rng(threads)
    x, weight = rng.normal(size=(33, 1088)), rng.normal(size=(1100, 1088))
    emulation.set_threads(1)
    alone = run(emulation, x, weight)
    emulation.set_threads(threads, in_turn)
    np.testing.assert_array_equal(run(emulation, x, weight), alone)


def test_a_token_does_not_depend_on_the_others(emulation: Emulation) -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(64, 96)), rng.normal(size=(275, 96))
    emulation.set_threads(1)
    together = run(emulation, x, weight)
    for first, tokens in [(0, 1), (63, 1), (20, 4), (8, 17), (30, 33), (1, 50)]:
        some = slice(first, first + tokens)
        np.testing.assert_array_equal(run(emulation, x[some], weight), together[some])
