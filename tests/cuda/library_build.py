"""Builds the whole CUDA library beside the other tests, which leave a core idle most of the time.

Objects are kept in build/, so that only the first run in a tree takes its minutes.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from csrc.cuda import architectures, build

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "build" / "cuda-test"
ARCHITECTURES = " ".join(architectures.ARCHITECTURES)
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


def complaints(said: str) -> str:
    """The end of what compilers said, without what ptxas tells of each kernel."""
    lines = [line for line in said.splitlines() if not re.match(r"ptxas info|    ", line)]
    return "\n".join(lines)[-4000:]


class LibraryBuild:
    """A build that runs from now on, with less right to the processors than the tests."""

    def __init__(self) -> None:
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
            self._process = subprocess.Popen(
                [
                    *("nice", "-n", str(NICENESS), sys.executable, "setup.py", "build_ext"),
                    *("--build-lib", str(OUTPUT)),
                ],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._record: dict[str, object] = {}
        self._waiting = threading.Thread(target=self._wait, daemon=True)
        self._waiting.start()

    def _wait(self) -> None:
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._record = {
            "architectures": ARCHITECTURES,
            "minutes": round((time.monotonic() - self._start) / 60, 1),
            "processor_minutes": round((usage.ru_utime + usage.ru_stime) / 60, 1),
            "peak_gib": round(usage.ru_maxrss / 2**20, 1),  # of the largest process
        }

    def library(self, report: Callable[[str], None]) -> Library:
        """Wait for the end; what a build took that compiled something is reported and kept."""
        self._waiting.join()
        said = self._said.read_text()
        assert self._process.returncode == 0, complaints(said)
        if "ptxas info" in said:
            self._log.write_text(said)
            (OUTPUT / "build.json").write_text(json.dumps(self._record, indent=1) + "\n")
            report(f"\nCUDA library: {json.dumps(self._record)}")
        log = self._log.read_text() if self._log.exists() else ""
        return Library(OUTPUT / "permllm_vllm" / "_C_cuda.so", log)

    def stop(self) -> None:
        """End what still runs: nobody will ask for it."""
        if self._waiting.is_alive():
            os.killpg(self._process.pid, 15)
            self._waiting.join()


LIBRARY_BUILD = pytest.StashKey[LibraryBuild]()
"""Where the configuration of a session holds the build."""
