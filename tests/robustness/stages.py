"""The stages of a command that writes a checkpoint, and a way to stop at one of them."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permllm_vllm.checkpoint import output, writer

STAGES: dict[str, tuple[Any, str]] = {
    "the directory is made": (Path, "mkdir"),
    "a shard is written": (writer, "save_file"),
    "a shard gets its name": (Path, "rename"),
    "companions are copied": (shutil, "copyfile"),
    "a file is written": (Path, "write_bytes"),
    "files are synchronized": (os, "fsync"),
    "the output gets its name": (output, "_swap"),
    "what was replaced is removed": (shutil, "rmtree"),
}


def stop_at(stage: str, passes: int, number: int) -> None:
    """Make this process send itself the signal when the stage has begun `passes` times before."""
    owner, name = STAGES[stage]
    original: Callable[..., Any] = getattr(owner, name)
    seen = 0

    def stopping(*arguments: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > passes:
            os.kill(os.getpid(), number)
        return original(*arguments, **options)

    setattr(owner, name, stopping)


def stop_before_the_new_name() -> None:
    """Make this process kill itself when a finished output is about to get its name."""
    rename = Path.rename

    def stopping(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = stopping  # type: ignore[method-assign, assignment]
