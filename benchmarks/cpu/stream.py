"""How fast memory in huge pages can be read, by readers that multiply nothing.

PyTorch's sum, and one of `stream_read.c` that prefetches as the kernels do, at several distances,
where a C compiler is installed. Both read every byte once.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

STREAM_BYTES = 256 << 20
"""More than any cache serves: even where the system names one of 480 MiB, shared with others, 512
and 1024 MiB are read no more slowly."""
HUGE_PAGE = 2 << 20
REPEATS = 5
SOURCE = Path(__file__).with_name("stream_read.c")
NO_HINT, INTO_L1, INTO_L2 = range(3)
WAYS = (
    (8, NO_HINT, 0),
    *((8, INTO_L1, distance) for distance in (1024, 2048, 4096)),
    *((8, INTO_L2, distance) for distance in (4608, 9216, 13824, 18432)),
    *((4, INTO_L1, distance) for distance in (512, 1024)),
    *((4, INTO_L2, distance) for distance in (512, 1024, 2048)),
)
"""Lines of a turn and hint of `stream_read.c`, and bytes ahead.

Those of 8 lines are what the kernels were tried with on Zen 4. Sapphire Rapids reads faster with 4,
prefetched near ahead.
"""
Reader = Callable[[Tensor], object]


def stream_rate(threads: int) -> float:
    """Bytes per microsecond that these threads read, the best of all readers and repeats."""
    memory = huge_pages(STREAM_BYTES)
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = float("inf")
    for read in readers(threads):
        for _ in range(REPEATS):
            begin = clock()
            read(memory)
            best = min(best, clock() - begin)
    return STREAM_BYTES / best / 1e6


def huge_pages(size: int) -> Tensor:
    """Zeros, uint8 `[size]`, in huge pages where the system grants them."""
    return pages(size, mmap.MADV_HUGEPAGE)


def pages(size: int, advice: int) -> Tensor:
    """Zeros, uint8 `[size]`, from the border of a huge page on, in pages of this advice."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    memory.madvise(advice)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE
    return everything[start : start + size].zero_()


def readers(threads: int) -> Iterator[Reader]:
    """PyTorch's sum with its own threads, and the prefetching ones with as many."""
    yield lambda memory: memory.view(torch.float32).sum()
    library = prefetching_library()
    if library is None:
        return
    for way in WAYS:
        yield lambda memory, way=way: read(library, memory, way, threads)  # type: ignore[misc]


def prefetching_library() -> ctypes.CDLL | None:
    """`stream_read.c`, compiled for this CPU; None where there is no C compiler."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "stream_read.so")
        options = ["-O3", "-march=native", "-shared", "-fPIC", "-w"]
        subprocess.run([compiler, *options, SOURCE, "-o", target], check=True)
        library = ctypes.CDLL(os.fspath(target))
    size, number = ctypes.c_size_t, ctypes.c_int
    library.stream_read.argtypes = [ctypes.c_void_p, size, number, number, size]
    library.stream_read.restype = ctypes.c_uint64
    return library


def read(library: ctypes.CDLL, memory: Tensor, way: tuple[int, int, int], threads: int) -> int:
    """The sum, modulo 2^64, of the 64-bit words of memory that begins on a cache line.

    The bytes are a multiple of 512 for each thread, which has a part of its own.
    """
    size = len(memory) // threads // 512 * 512
    parts = [
        (i * size, size if i + 1 < threads else len(memory) - i * size) for i in range(threads)
    ]

    def read_part(part: tuple[int, int]) -> int:
        return int(library.stream_read(memory.data_ptr() + part[0], part[1], *way))

    if threads == 1:
        return read_part(parts[0])
    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read_part, parts)) % 2**64
