"""Paths: what a name of this machine stands for, and where the work for an output lies."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a name with its ``~`` or ``~user`` expanded.

    A name that begins with the home directory of nobody is a path as it stands.
    """
    # Path.expanduser raises RuntimeError where there is no such home directory.
    return Path(os.path.expanduser(name))


def work_directory(output: Path) -> Path:
    """Return the folder for the finished steps of an output: ``.NAME.work`` beside it."""
    destination = output.resolve()
    return destination.with_name(f".{destination.name}.work")
