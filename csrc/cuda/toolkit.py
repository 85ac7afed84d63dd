"""Finds nvcc, its libraries and CUTLASS on this machine; standard library only."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

LEAST_NVCC = (12, 8)
LEAST_CUTLASS = (4, 2)


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME where that is set, else on the PATH, else the usual place."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [
        *(Path(home) / "bin" / "nvcc" for home in homes),
        Path("/usr/local/cuda/bin/nvcc"),
    ]
    found = [str(path) for path in candidates[: len(homes)] if path.exists()]
    found += [path for path in (shutil.which("nvcc"),) if path]
    found += [str(path) for path in candidates[len(homes) :] if path.exists()]
    return found[0] if found else None


def nvcc_version() -> tuple[int, int]:
    """What `nvcc` says of its release; that it is new enough where it says nothing of the kind."""
    return _release(nvcc() or "nvcc")


def home() -> Path | None:
    """The CUDA toolkit: where nvcc is, or the usual place where that nvcc is only a wrapper."""
    compiler = nvcc()
    beside = [Path(compiler).resolve().parents[1]] if compiler else []
    for directory in (*beside, Path("/usr/local/cuda")):
        if (directory / "include" / "cuda_runtime_api.h").exists():
            return directory
    return None


def library_directories() -> list[Path]:
    """Where the toolkit's static runtime may be."""
    toolkit = home()
    if toolkit is None:
        return []
    directories = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*-linux/lib")]
    return [path for path in directories if (path / "libcudart_static.a").exists()]


def cutlass() -> Path | None:
    """The directory that holds CUTLASS' `include`, of version 4.2 or later.

    PERMLLM_CUTLASS_DIR decides where it is set; else the packages nvidia-cutlass (which installs
    `cutlass_library`) and flashinfer-python are looked up, without being imported.
    """
    chosen = os.environ.get("PERMLLM_CUTLASS_DIR")
    if chosen:
        return Path(chosen) if _version(Path(chosen)) >= LEAST_CUTLASS else None
    for package, inside in (("cutlass_library", "source"), ("flashinfer", "data/cutlass")):
        spec = importlib.util.find_spec(package)
        for root in (spec.submodule_search_locations or []) if spec else []:
            if _version(Path(root) / inside) >= LEAST_CUTLASS:
                return Path(root) / inside
    return None


def cutlass_missing() -> str:
    """What to do where `cutlass` finds nothing."""
    chosen = os.environ.get("PERMLLM_CUTLASS_DIR")
    if chosen:
        return (
            f"PERMLLM_CUTLASS_DIR={chosen} holds no CUTLASS 4.2 or later "
            "(include/cutlass/version.h): set it to a CUTLASS checkout"
        )
    return (
        "the CUTLASS headers were not found: pip install --no-deps nvidia-cutlass==4.2.0.0, or set "
        "PERMLLM_CUTLASS_DIR to a CUTLASS checkout of version 4.2 or later"
    )


@cache
def _release(compiler: str) -> tuple[int, int]:
    try:
        told = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return LEAST_NVCC
    found = re.search(r"release (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else LEAST_NVCC


def _version(directory: Path) -> tuple[int, int]:
    header = directory / "include" / "cutlass" / "version.h"
    if not header.exists():
        return 0, 0
    text = header.read_text()
    numbers = [re.search(rf"#define CUTLASS_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    major, minor = (int(number[1]) if number else 0 for number in numbers)
    return major, minor
