"""The most memory that processes hold while an engine starts and runs, and a limit of it."""

import math
import threading
from collections.abc import Collection
from contextlib import suppress

import psutil

SAMPLE_SECONDS = 0.25
FULL_MIB = 512
"""What is left for all others when the system begins to kill, a fraction of a second later."""


class MemoryWatch:
    """Watches the processes that this one starts from now on, four times a second.

    Counted is what a process has to itself, psutil's `rss` less `shared`. Pages of mapped files,
    such as libraries and a checkpoint while it is read, are left out: the system takes them back
    when it needs memory.

    Args:
        limit_gib: all processes that were started are killed when the sum is beyond it.
        this_too: whether this process counts, which is the front end of an engine that it starts.
    """

    def __init__(self, limit_gib: float | None = None, *, this_too: bool = False) -> None:
        self.peak_mib = 0.0
        self.least_left_mib = math.inf
        self.exceeded: str | None = None
        self._limit_gib, self._this_too = limit_gib, this_too
        self._others = frozenset(psutil.Process().children())
        self._settled: list[psutil.Process] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def processes(self) -> list[psutil.Process]:
        """What was started since the watch began, by this process and so on down.

        Not what children from before start: a build beside the tests goes on when an engine ends.
        """
        if self._settled is not None:
            return self._settled
        started = [one for one in psutil.Process().children() if one not in self._others]
        return [one for child in started for one in (child, *descendants(child))]

    def settle(self) -> None:
        """Look for no further processes: that would take time from those that are measured."""
        self._settled = self.processes()

    def full(self) -> str:
        """That the machine had hardly any memory left, after which the system kills; else empty."""
        if self.least_left_mib >= FULL_MIB:
            return ""
        return f"the machine had {self.least_left_mib:.0f} MiB of memory left"

    def sample(self) -> None:
        """Look now, too."""
        started = self.processes()
        used = private_mib([psutil.Process(), *started] if self._this_too else started)
        self.peak_mib = max(self.peak_mib, used)
        left = psutil.virtual_memory().available / 2**20
        self.least_left_mib = min(self.least_left_mib, left)
        if self._limit_gib is not None and used > 1024 * self._limit_gib:
            self.exceeded = (
                f"its processes held {used:.0f} MiB, more than {self._limit_gib:g} GiB: give a "
                "higher --memory-limit, or a smaller --kv-cache"
            )
            for process in started:
                with suppress(psutil.NoSuchProcess):
                    process.kill()

    def close(self) -> None:
        """Stop watching."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self.sample()


def private_mib(processes: Collection[psutil.Process]) -> float:
    """Memory that processes have to themselves; those that have ended have none."""
    total = 0
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            memory = process.memory_info()
            total += memory.rss - memory.shared
    return total / 2**20


def descendants(process: psutil.Process) -> list[psutil.Process]:
    """All processes below one, none of one that has ended."""
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []
