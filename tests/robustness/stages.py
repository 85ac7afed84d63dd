"""The stages of a command, ways to stop at one of them, and other trouble on the way."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from permllm_offline.permutation import span_learning
from permllm_offline.reconstruction import blockwise, distillation
from permllm_offline.run import steps
from permllm_vllm.checkpoint import output, writer
from permllm_vllm.checkpoint.shard import Shard

STAGES: dict[str, tuple[Any, str]] = {
    "learning takes a step": (span_learning, "cosine"),
    "distillation takes a step": (distillation, "warmed_cosine"),
    "tuning takes a step": (blockwise, "warmed_cosine"),
    "a finished step is written": (steps, "save_file"),
    "a finished step gets its name": (Path, "replace"),
    "the directory is made": (Path, "mkdir"),
    "a shard is written": (writer, "save_file"),
    "a shard gets its name": (Path, "rename"),
    "companions are copied": (shutil, "copyfile"),
    "a file is written": (Path, "write_bytes"),
    "files are synchronized": (os, "fsync"),
    "the output gets its name": (output, "_swap"),
    "what was replaced is removed": (shutil, "rmtree"),
}


def stop_at(stage: str, number: int) -> None:
    """Make this process send itself the signal at `STAGE`, or at `STAGE:N` when it comes again.

    N is how often the stage has begun before.
    """
    stage, _, passes = stage.partition(":")
    owner, name = STAGES[stage]
    original: Callable[..., Any] = getattr(owner, name)
    left = int(passes or 0)

    def stopping(*arguments: Any, **options: Any) -> Any:
        nonlocal left
        if left == 0:
            os.kill(os.getpid(), number)
        left -= 1
        return original(*arguments, **options)

    setattr(owner, name, stopping)


def kill_after(seconds: float) -> None:
    """Make this process kill itself after so many seconds, wherever it is then."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGKILL))
    timer.daemon = True
    timer.start()


def stop_before_the_new_name() -> None:
    """Make this process kill itself when a finished output is about to get its name."""
    rename = Path.rename

    def stopping(path: Path, target: Path) -> Path:
        if path.suffix == ".partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.rename = stopping  # type: ignore[method-assign, assignment]


def cut_short(file: Path, reads: int) -> None:
    """Make a file lose its second half when `reads` tensors of it have been read."""
    original = Shard.part
    left = reads

    def cutting(shard: Shard, name: str, start: int, shape: Sequence[int]) -> Tensor:
        nonlocal left
        if left == 0:
            os.truncate(file, file.stat().st_size // 2)
        left -= 1
        return original(shard, name, start, shape)

    Shard.part = cutting  # type: ignore[method-assign]


def obey_permissions() -> None:
    """Take from this process what lets an administrator read and write against permissions.

    Files stay its own, so that it finds the interpreter wherever that is. A process of anybody else
    loses nothing.
    """
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable; 32 bits, then the rest
    if system.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for index in range(3):
        sets[index] &= ~_AGAINST_PERMISSIONS
    if system.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


_CAPABILITY_VERSION = 0x20080522
_AGAINST_PERMISSIONS = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of Linux
