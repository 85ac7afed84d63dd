"""Whether physical memory is fragmented, which slows whoever reads weights in pages of 4 KiB.

    python -m benchmarks.cpu.fragmentation           # the rates of both kinds of pages
    python -m benchmarks.cpu.fragmentation --hold    # and take scattered pages out of the way

A system that has run for long gives out pages that lie all over its memory. A virtual machine may
read those a tenth as fast as huge pages, and with them every dense peer, while sparse weights, in
huge pages, stay fast: a comparison would flatter them. `--hold` takes pages until fresh ones are
read as fast as huge ones, and keeps them until it is interrupted: measure meanwhile. What it has to
take is less after `echo 1 > /proc/sys/vm/compact_memory` as root.
"""

from __future__ import annotations

import argparse
import mmap
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil
import torch
from rich.console import Console
from torch import Tensor

SAMPLE = 256 << 20
"""Bytes that are read; no cache serves as many, even where the system names one of 480 MiB."""
HUGE_PAGE = 2 << 20
REPEATS = 3
ENOUGH = 0.9
"""Of the rate of huge pages, at which nothing more is taken out of the way."""
Allocate = Callable[[int], Tensor]


def huge_pages(size: int) -> Tensor:
    """Zeros, uint8 `[size]`, in huge pages where the system grants them."""
    return _pages(size, mmap.MADV_HUGEPAGE)


def small_pages(size: int) -> Tensor:
    """Zeros, uint8 `[size]`, in pages of the system's smallest size, as malloc gives them."""
    return _pages(size, mmap.MADV_NOHUGEPAGE)


def _pages(size: int, advice: int) -> Tensor:
    """Zeros, uint8 `[size]`, from the border of a huge page on, in pages of this advice."""
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=mmap.MAP_PRIVATE)
    memory.madvise(advice)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE
    return everything[start : start + size].zero_()


def rate(memory: Tensor) -> float:
    """Bytes per microsecond at which one thread reads, by NumPy's sum; the best of a few."""
    words, best = memory.numpy().view("uint64"), float("inf")
    for _ in range(REPEATS):
        begin = time.thread_time()
        words.sum()
        best = min(best, time.thread_time() - begin)
    return len(memory) / best / 1e6


def share(size: int = SAMPLE) -> float:
    """The rate at which fresh small pages are read, as a share of that of huge ones."""
    return rate(small_pages(size)) / rate(huge_pages(size))


def hold(
    most: int, allocate: Allocate = small_pages, read: Callable[[Tensor], float] = rate
) -> tuple[list[Tensor], float]:
    """Take small pages until fresh ones are fast.

    Args:
        most: bytes to take.
        allocate: gives fresh pages.
        read: measures them.

    Returns:
        What was taken, without the fast pages at the end, and their share of huge pages' rate.
    """
    taken: list[Tensor] = []
    reference, found = rate(huge_pages(SAMPLE)), 0.0
    while len(taken) * SAMPLE < most:
        fresh = allocate(SAMPLE)
        found = read(fresh) / reference
        if found >= ENOUGH:
            break
        taken.append(fresh)
    return taken, found


def main() -> None:
    """Prints both rates; with --hold, keeps scattered pages until it is interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu.fragmentation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hold", action="store_true", help="take scattered pages out of the way")
    parser.add_argument(
        "--most", type=float, metavar="GIB",
        help="of memory to hold (default: a third of what is available)",
    )  # fmt: skip
    options = parser.parse_args()
    console = Console()
    for name, memory in (("huge", huge_pages(SAMPLE)), ("small", small_pages(SAMPLE))):
        console.print(f"{name} pages: {rate(memory) / 1e3:.1f} GB/s", highlight=False)
    if not options.hold:
        return
    available = psutil.virtual_memory().available
    most = available / 3 if options.most is None else options.most * 2**30
    taken, found = hold(int(most))
    console.print(
        f"{len(taken) * SAMPLE / 2**30:.2f} GiB of scattered pages are held; fresh ones are read "
        f"at {found:.0%} of the rate of huge ones. Ctrl-C gives them back.",
        highlight=False,
    )
    with suppress(KeyboardInterrupt):
        signal.pause()


if __name__ == "__main__":
    main()
