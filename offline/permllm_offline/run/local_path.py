"""The path that a name of this machine stands for."""

from __future__ import annotations

import os
from pathlib import Path


def local_path(name: str | os.PathLike[str]) -> Path:
    """Return the path of a name with its ``~`` or ``~user`` expanded.

    A name that begins with the home directory of nobody is a path as it stands.
    """
    # Path.expanduser raises RuntimeError where there is no such home directory.
    return Path(os.path.expanduser(name))
