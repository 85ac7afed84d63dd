"""What the steps of a prune took: time, and the memory until then."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch


@dataclass(frozen=True)
class Cost:
    """Of one step: seconds, and the most bytes that the process ever held until its end.

    The memory is that of host and GPU together, or None where the system does not tell it.
    """

    name: str
    seconds: float
    peak_bytes: int | None


@contextmanager
def measured(name: str, costs: list[Cost]) -> Iterator[None]:
    """Append the cost of what is done in the context."""
    start = time.perf_counter()
    yield
    costs.append(Cost(name, time.perf_counter() - start, peak_bytes()))


def peak_bytes() -> int | None:
    """Bytes that this process has held at most, on the host and on the GPU."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return host + device


def costs_json(costs: Sequence[Cost]) -> str:
    """Text of ``costs.json``: what differs from run to run, and so is not in ``report.json``."""
    entries = {
        "seconds": sum(cost.seconds for cost in costs),
        "peak_bytes": max((cost.peak_bytes or 0 for cost in costs), default=0) or None,
        "steps": [asdict(cost) for cost in costs],
    }
    return json.dumps(entries, indent=2) + "\n"
