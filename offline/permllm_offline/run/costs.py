"""What the steps of a prune took: time, and the memory until then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds, and the most bytes that the process ever held until its end.

    The memory is that of host and GPU together, or None where the system does not tell it.
    ``processor_seconds`` are those of all threads: other work on the machine does not add to them.
    """

    name: str
    seconds: float
    peak_bytes: int | None
    processor_seconds: float = 0.0


class Clock:
    """Counts what is done of one step, from now on."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._start, self._processor = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        """What the step took until now."""
        seconds = time.perf_counter() - self._start
        return Cost(self._name, seconds, peak_bytes(), time.process_time() - self._processor)


@contextmanager
def measured(name: str, costs: list[Cost], running: list[Clock]) -> Iterator[None]:
    """Add the cost of what is done in the context to those of its name, as ``add`` does.

    Args:
        name: of the step.
        costs: of what is finished.
        running: clocks of what is not, this one among them while the context lasts.
    """
    clock = Clock(name)
    running.append(clock)
    try:
        yield
    finally:
        running.remove(clock)
    add(costs, clock.cost())


def add(costs: list[Cost], cost: Cost) -> None:
    """Append a cost, or add it to the one of its name.

    So what is done again for every decoder layer, or after an interruption, is one entry.
    """
    for index, before in enumerate(costs):
        if before.name == cost.name:
            peaks = [peak for peak in (before.peak_bytes, cost.peak_bytes) if peak is not None]
            costs[index] = Cost(
                cost.name,
                before.seconds + cost.seconds,
                max(peaks, default=None),
                before.processor_seconds + cost.processor_seconds,
            )
            return
    costs.append(cost)


def costs_until_now(costs: Iterable[Cost], running: Iterable[Clock]) -> list[Cost]:
    """What is finished, and what was done so far of what is not."""
    found = list(costs)
    for clock in running:
        add(found, clock.cost())
    return found


def peak_bytes() -> int | None:
    """Bytes that this process has held at most, on the host and on the GPU.

    None where the system does not tell.
    """
    host = _host_peak_bytes()
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return None if host is None else host + device


def _host_peak_bytes() -> int | None:
    """From Linux itself: what `getrusage` says there counts the process that started this one."""
    if _STATUS.exists():
        lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
        peaks = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
        return int(peaks[0]) * 1024 if peaks else None
    if sys.platform != "darwin":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def costs_json(costs: Sequence[Cost]) -> str:
    """Text of ``costs.json``: what differs from run to run, and so is not in ``report.json``."""
    entries = {
        "seconds": sum(cost.seconds for cost in costs),
        "processor_seconds": sum(cost.processor_seconds for cost in costs),
        "peak_bytes": max((cost.peak_bytes or 0 for cost in costs), default=0) or None,
        "steps": [asdict(cost) for cost in costs],
    }
    return json.dumps(entries, indent=2) + "\n"
