"""Resident memory of a process and its children while something runs."""

import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import psutil

WARM_SHARE = 0.4
SAMPLE_SECONDS = 1.0


@dataclass
class Memory:
    """Resident memory of the server's processes, in MiB, sampled while traffic runs."""

    samples: list[float] = field(default_factory=list)

    def growth(self) -> tuple[float, float]:
        """Median of the first and of the last quarter after warming up."""
        warm = self.samples[int(len(self.samples) * WARM_SHARE) :]
        quarter = max(1, len(warm) // 4)
        return statistics.median(warm[:quarter]), statistics.median(warm[-quarter:])


@contextmanager
def watched(process: psutil.Process) -> Iterator[Memory]:
    """Sample the resident memory of a process and its children while the block runs."""
    memory, stop = Memory(), threading.Event()

    def sample() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            memory.samples.append(resident_mib(process))

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        stop.set()
        thread.join()


def resident_mib(process: psutil.Process) -> float:
    """Resident memory of a process and all below it."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total / 2**20
