"""Bytes of memory that this process may use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from permllm_offline.run.processes import local_count

_MEMORY = Path("/proc/meminfo")
_GROUPS_OF_PROCESS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def memory_bytes(device: torch.device) -> int | None:
    """Bytes of memory of a device; of the host, the share of this process in what it may use.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limits = [limit for file in _limit_files() if (limit := _limit(file)) is not None]
    return min([host, *limits]) // local_count()


def free_bytes() -> int | None:
    """Bytes of the host's memory that other programs leave, the share of this process.

    None where the system does not tell; what the control group of a process holds does not count.
    """
    for line in _text(_MEMORY).splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return int(amount.split()[0]) * 1024 // local_count()
    return None


def _limit_files() -> Iterator[Path]:
    """Where Linux says what the control group of this process may use, and every group above it.

    Containers see their own group as the topmost; SLURM and systemd set limits further below.
    """
    for line in _text(_GROUPS_OF_PROCESS).splitlines():
        _, controllers, name = line.split(":", 2)
        if not controllers:  # version 2
            root, file = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = PurePosixPath(name)
        for above in (group, *group.parents):
            yield root / above.relative_to(above.anchor) / file


def _limit(file: Path) -> int | None:
    """What a control group allows; None where there is none, or no limit."""
    try:
        return int(_text(file))
    except ValueError:
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""
