"""Builds the whole CUDA library beside the other tests, which leave a core idle most of the time.

Objects are kept in build/, so that only the first run in a tree takes its minutes. Where
PERMLLM_CUDA_ARCHS chooses architectures, as for a release, the kernels that a build may have come
after it, because both need as much memory as many a machine has: to PTX and hardly optimized, for
whole they would take as long again.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import pytest

from csrc.cuda import architectures, build, toolkit

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "cuda-test"
ARCHITECTURES = " ".join(architectures.chosen() or ("80", "90a"))
"""What the tests build: those of PERMLLM_CUDA_ARCHS, else our kernels once and all of CUTLASS'.

All that are supported take half as long again, for the same sources.
"""
NICENESS = 10
AT_A_WORD = ("sh", "-c", 'read -r word && exec "$@"', "sh")
"""Runs the command after it when its input has a line.

It is there before any test: what ends the processes that a test has started must not find it new.
"""


@dataclass(frozen=True)
class Library:
    path: Path
    log: str
    """What the compilers said when they last ran."""


@dataclass(frozen=True)
class OptionalKernels:
    status: int
    errors: str
    ptx: Path


def missing() -> str:
    """Why the library cannot be built here, or nothing."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PERMLLM_CUDA_ARCHS", ARCHITECTURES)
        reason = build.missing_toolkit()
    if reason or shutil.which("c++") or os.environ.get("CXX"):
        return reason or ""
    return "no C++ compiler was found; install g++"


def complaints(said: str) -> str:
    """The end of what compilers said, without what ptxas tells of each kernel."""
    lines = [line for line in said.splitlines() if not re.match(r"ptxas info|    ", line)]
    return "\n".join(lines)[-4000:]


def optional_command(ptx: Path) -> list[str]:
    """What compiles the kernels of one type that a build for Blackwell may have."""
    return [
        *(str(toolkit.nvcc()), *build.NVCC_FLAGS, *build.CUTLASS_FLAGS, "-Xcicc", "-O0"),
        *("-isystem", str(toolkit.cutlass() / "include"), "-arch=sm_100a", "-ptx"),
        *(str(ROOT / build.SOURCES / "many_tokens_sm100_bfloat16.cu"), "-o", str(ptx)),
    ]


class LibraryBuild:
    """A build that runs from now on, with less right to the processors than the tests.

    `optional` compiles the optional kernels too.
    """

    def __init__(self, *, optional: bool) -> None:
        OUTPUT.mkdir(parents=True, exist_ok=True)
        self._said, self._log = OUTPUT / "output", OUTPUT / "build.log"
        environment = {
            "PERMLLM_BUILD_CUDA": "1",
            "PERMLLM_BUILD_CPU": "0",
            "PERMLLM_CUDA_ARCHS": ARCHITECTURES,
            "NVCC_APPEND_FLAGS": "-Xptxas -v",
        }
        self._start = time.monotonic()
        with self._said.open("w") as output:
            command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(OUTPUT)]
            self._process = _started(command, output, os.environ | environment)
        self._record: dict[str, object] = {}
        self._status: int | None = None
        self._stopped = False
        self._ptx, self._errors = OUTPUT / "optional.ptx", OUTPUT / "optional-errors"
        self._ptx.unlink(missing_ok=True)
        self._later: subprocess.Popen[bytes] | None = None
        if optional:
            with self._errors.open("w") as errors:
                self._later = _started([*AT_A_WORD, *optional_command(self._ptx)], errors)
        self._built = threading.Event()
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = self._status = os.waitstatus_to_exitcode(status)
        self._record = {
            "architectures": ARCHITECTURES,
            "minutes": round((time.monotonic() - self._start) / 60, 1),
            "processor_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 1),
            "peak_gib": round(usage.ru_maxrss / 2**20, 1),  # of the largest process
        }
        self._built.set()
        if self._later:
            if self._status != 0 or self._stopped:
                self._later.terminate()
            self._later.communicate(b"\n")

    def library(self, report: Callable[[str], None]) -> Library:
        """Wait for the end; what a build took that compiled something is reported and kept."""
        self._built.wait()
        said = self._said.read_text()
        assert self._status == 0, complaints(said)
        if "ptxas info" in said:
            self._log.write_text(said)
            (OUTPUT / "build.json").write_text(json.dumps(self._record, indent=1) + "\n")
            report(f"\nCUDA library: {json.dumps(self._record)}")
        log = self._log.read_text() if self._log.exists() else ""
        return Library(OUTPUT / "permllm_vllm" / "_C_cuda.so", log)

    def optional_kernels(self) -> OptionalKernels:
        """Wait for them, too."""
        self._waiting.join()
        assert self._later is not None
        return OptionalKernels(self._later.returncode, self._errors.read_text(), self._ptx)

    def stop(self) -> None:
        """End what still runs: nobody will ask for it."""
        self._stopped = True
        while self._waiting.is_alive():
            running = [self._process] if self._status is None else []
            for process in (*running, *([self._later] if self._later else [])):
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGTERM)
            self._waiting.join(timeout=1)


def _started(
    command: list[str], output: IO[str], environment: Mapping[str, str] = os.environ
) -> subprocess.Popen[bytes]:
    """A group of processes of its own, so that all of them can be ended."""
    return subprocess.Popen(
        ["nice", "-n", str(NICENESS), *command],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


LIBRARY_BUILD = pytest.StashKey[LibraryBuild]()
"""Where the configuration of a session holds the build."""
