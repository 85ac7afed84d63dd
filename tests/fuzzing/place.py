"""A directory in memory for one process, which its inputs share."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path


@cache
def directory() -> Path:
    """An empty directory, removed when the process ends."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="permllm-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def write(name: str, content: bytes) -> Path:
    """Put a file there and return the directory."""
    (directory() / name).write_bytes(content)
    return directory()


def remove(name: str) -> None:
    (directory() / name).unlink(missing_ok=True)
