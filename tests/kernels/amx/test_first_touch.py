"""A thread multiplies the row groups that it packed, before it helps another."""

import ctypes

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.kernels.amx.emulated import NEEDS, Emulation
from tests.kernels.amx.operators import EmulatedOperators

pytestmark = NEEDS

ROWS, K = 16, 64
BLOCK_BYTES = ROWS * (8 + 48)
"""In 12 bits."""
TWELVE_BITS = 2
"""Of csrc/cpu/packing/layout.h."""
UNTOUCHED = 0xA5
NOBODY = -1
AFTER_RANGE = ctypes.CFUNCTYPE(None, ctypes.c_int64)


def packers(emulation: Emulation, n: int, threads: int) -> NDArray[np.int64]:
    """The thread that writes each row group, seen while packing runs one thread after another."""
    library = EmulatedOperators(emulation).library
    values = np.zeros((n, K // 2), np.uint16)
    mask = np.full((n, K // 8), 0x33, np.uint8)
    packed = torch.full(
        (library.packed_size(TWELVE_BITS, 0, n, K),), UNTOUCHED, dtype=torch.uint8
    ).numpy()
    groups = -(-n // ROWS)
    first_bytes = packed[: groups * BLOCK_BYTES].reshape(groups, BLOCK_BYTES)[:, 0]
    found = np.full(groups, NOBODY)

    @AFTER_RANGE
    def look(thread: int) -> None:
        found[(first_bytes != UNTOUCHED) & (found == NOBODY)] = thread

    emulation.set_threads(threads, in_turn=True)
    library.set_after_range(look)
    library.pack_weight(
        False, values.ctypes.data, mask.ctypes.data, None, 64, 8, n, K, packed.ctypes.data
    )
    library.set_after_range(None)
    assert (found != NOBODY).all()
    return found


@pytest.mark.parametrize("threads", [1, 2, 3, 5, 56])
@pytest.mark.parametrize("n", [8, 40, 272, 688, 4096])
def test_a_thread_reads_what_it_packed(emulation, n: int, threads: int) -> None:
    found = packers(emulation, n, threads)
    library = emulation.library
    for m in (3, 17, 33, 64, 65, 256, 257, 512, 1024):
        readers = 0
        for worker in range(threads):
            reads = np.zeros(len(found), np.int64)
            if m <= 32:
                times = library.reads_of_few(n, threads, worker, reads.ctypes.data)
            else:
                times = library.reads_of_many(m, n, K, threads, worker, reads.ctypes.data)
            np.testing.assert_array_equal(reads, times * (found == worker), f"{m=} {worker=}")
            readers += times > 0
        assert readers == len(set(found.tolist()))
