"""Whether the kernels of this checkout run on this GPU: a small layer is multiplied.

    python -m benchmarks.cuda.check

Fails where PyTorch would multiply instead, and where the result is wrong.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from permllm_vllm.backends import fallback_reason

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("benchmarks", "csrc", "permllm_vllm", "tests")


def foreign(names: Iterable[str] = PACKAGES) -> str:
    """Which package is imported from elsewhere, and what to do about it; empty where none is."""
    for name in names:
        file = importlib.import_module(name).__file__
        if file is None or Path(file).resolve().parent != ROOT / name:
            return (
                f"{name} is imported from {file or 'several places'}, not from {ROOT}: run in that "
                "folder, and take off PYTHONPATH, or uninstall, what has a package of this name"
            )
    return ""


def main() -> None:
    """Exits with the reason where they do not run."""
    sys.exit(foreign() or fallback_reason(torch.device("cuda"), torch.bfloat16) or None)


if __name__ == "__main__":
    main()
