"""Builds the whole CUDA library, in build/, so that only the first run in a tree takes minutes."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from csrc.cuda import architectures, build

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "cuda-test"
ARCHITECTURES = " ".join(architectures.chosen() or ("80", "90a"))
"""What the tests build: those of PERMLLM_CUDA_ARCHS, else every source once."""
NICENESS = 10


@dataclass(frozen=True)
class Library:
    path: Path
    log: str
    """What the compilers said when they last ran."""


def missing() -> str:
    """Why the library cannot be built here, or nothing."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PERMLLM_CUDA_ARCHS", ARCHITECTURES)
        reason = build.missing_toolkit()
    if reason or shutil.which("c++") or os.environ.get("CXX"):
        return reason or ""
    return "no C++ compiler was found; install g++"


def built() -> Library:
    """The library, with less right to the processors than the tests beside it."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    log = OUTPUT / "build.log"
    environment = {
        "PERMLLM_BUILD_CUDA": "1",
        "PERMLLM_BUILD_CPU": "0",
        "PERMLLM_CUDA_ARCHS": ARCHITECTURES,
        "NVCC_APPEND_FLAGS": "-Xptxas -v",
    }
    result = subprocess.run(
        ["nice", "-n", str(NICENESS), sys.executable, "setup.py", "build_ext", "--build-lib",
         str(OUTPUT)],
        cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    said = [line for line in result.stdout.splitlines() if not line.startswith(("ptxas", "    "))]
    assert result.returncode == 0, "\n".join(said)[-4000:]
    if "ptxas info" in result.stdout:
        log.write_text(result.stdout)
    return Library(OUTPUT / "permllm_vllm" / "_C_cuda.so", log.read_text() if log.exists() else "")
