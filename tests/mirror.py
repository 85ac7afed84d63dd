"""A copy of the tree whose package has room for another library in the place of its own."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("tests", "benchmarks", "offline", "csrc", "pyproject.toml", "setup.py")


def mirror(tree: Path) -> Path:
    """Make the copy, the folder of which must not be there; returns where its library belongs."""
    tree.mkdir(parents=True)
    for linked in LINKED:
        (tree / linked).symlink_to(ROOT / linked)
    shutil.copytree(ROOT / "permllm_vllm", tree / "permllm_vllm", ignore=_libraries)
    return tree / "permllm_vllm" / "_C.so"


def _libraries(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".so") or name == "__pycache__"]
