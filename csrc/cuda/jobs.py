"""How many compilers run at a time, by processors and memory; standard library only.

Environment variables:
    MAX_JOBS: at most so many.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

CUTLASS_BYTES = 9 << 30
"""What nvcc takes for a source that includes CUTLASS: 7.4 GiB were the most, and some room."""
OTHER_BYTES = 2 << 30
"""What it takes for the others."""
MEMINFO = Path("/proc/meminfo")
#: Limit and use of the group that this process is in, of control groups 2 and 1.
CONTROL_GROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


class Jobs(NamedTuple):
    """Compilers at a time: on CUTLASS, and on other sources beside them; 0 where in turn."""

    cutlass: int
    others: int


def jobs() -> Jobs:
    """One on CUTLASS and one beside it; more where there are processors and memory.

    Two processors or 20 GiB allow no more than these two, so that a build takes less than 12 GB
    there.

    Raises:
        ValueError: MAX_JOBS is no positive number.
    """
    most = os.environ.get("MAX_JOBS", "").strip()
    if most and not re.fullmatch(r"[1-9]\d*", most):
        raise ValueError(f"MAX_JOBS is {most!r}: it must be a positive number; correct or unset it")
    processors = len(os.sched_getaffinity(0))
    fit = (available_bytes() - OTHER_BYTES) // CUTLASS_BYTES
    cutlass = max(1, min(processors // 2, fit))
    others = max(1, min(processors // 2, fit))
    if most == "1":
        return Jobs(1, 0)
    if most:
        cutlass = min(cutlass, int(most) - 1)
        others = min(others, int(most) - cutlass)
    return Jobs(cutlass, others)


def available_bytes() -> int:
    """Memory that this process may take, 0 where the system does not tell."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _read(MEMINFO))
    sizes = [int(found[1]) << 10] if found else []
    for limit, used in CONTROL_GROUPS:
        if _read(limit).strip().isdigit() and _read(used).strip().isdigit():  # not "max"
            sizes.append(max(0, int(_read(limit)) - int(_read(used))))
    return min(sizes, default=0)


def _read(file: Path) -> str:
    return file.read_text() if file.exists() else ""
