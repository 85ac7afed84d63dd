"""Which GPU architectures a build is for; standard library only.

Environment variables:
    PERMLLM_CUDA_ARCHS: architectures as nvcc names them, separated by blanks or commas.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from functools import cache

#: 8.9 runs what was compiled for 8.0; the last one also as PTX, for GPUs of the future.
ARCHITECTURES = ("80", "90a", "100", "120")


def chosen() -> list[str]:
    """PERMLLM_CUDA_ARCHS in ascending order, empty where it is not set.

    Raises:
        ValueError: an entry that is no architecture from 80 on.
    """
    entries = re.split(r"[\s,;]+", os.environ.get("PERMLLM_CUDA_ARCHS", "").strip())
    names = [entry.replace(".", "") for entry in entries if entry]
    for name in names:
        if not re.fullmatch(r"\d+[af]?", name) or int(name.rstrip("af")) < 80:
            raise ValueError(
                f"PERMLLM_CUDA_ARCHS names {name!r}: architectures are numbers from 80 on as nvcc "
                f"names them; use some of {' '.join(ARCHITECTURES)}"
            )
    return _ascending("90a" if name == "90" else name for name in names)


def of_gpus_here() -> list[str]:
    """Of ARCHITECTURES, or beside them, what the GPUs of this machine run: by major version."""
    versions = [capability.split(".") for capability in capabilities()]
    return _ascending(
        of_capability(int(major), int(minor)) for major, minor in versions if int(major) >= 8
    )


def of_capability(major: int, minor: int) -> str:
    """What a GPU runs: the one of ARCHITECTURES with its major version, else its own name.

    nvcc 12.8 does not know every minor version: 103 and 121 take a later one.
    """
    known = {int(name.rstrip("a")) // 10: name for name in ARCHITECTURES}
    return known.get(major, f"{major}{minor}")


def architectures() -> list[str]:
    """Those of PERMLLM_CUDA_ARCHS, else of the GPUs here, else all that are supported.

    Raises:
        ValueError: as of `chosen`.
    """
    return chosen() or of_gpus_here() or list(ARCHITECTURES)


@cache
def capabilities() -> list[str]:
    """Compute capabilities of the GPUs that nvidia-smi finds, such as 9.0; empty without it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return sorted(set(re.findall(r"^\d+\.\d+$", told.stdout, re.MULTILINE)))


def _ascending(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (int(name.rstrip("af")), name))
