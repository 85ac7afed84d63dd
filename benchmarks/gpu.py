"""What a machine with one NVIDIA GPU can tell: builds, tests, generates with and times the kernels.

    python -m benchmarks.gpu

Needs PyTorch, pytest and hypothesis, and to build setuptools 77 or later, nvcc and CUTLASS
(docs/cuda.md); no network. The library is built anew where it can be, else the one that is there is
used. Results are written to build/gpu, with the steps and how they ended, and a table of these is
printed last. The exit status is 0 where every step ran and passed. A build may take 20 minutes; ten
more are for all that follows it, and begin when it has ended.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.cuda import INCOMPLETE
from benchmarks.records.machine import revision, write_json
from csrc.cuda import architectures, build, toolkit

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "permllm_vllm" / "_C_cuda.so"
BUILD_SECONDS = 1200.0
"""For the build, which is part of no other limit."""
SECONDS = 570.0
"""Of ten minutes after the build: the rest is for the start and the closing table."""
EXPERT_SECONDS = 20.0
"""For the experts of one model, without the number of tokens that was begun last."""
SANITIZED = "every_weight or permute_inputs or strided or deterministic or (test_int8 and 75)"
SANITIZER_SECONDS = 150.0
# Our own kernels alone: linear layers of up to 64 tokens, experts of few pairs and of many.
SYNCHRONISED = "(every_weight and not 200) or one_expert"
SYNCHRONISATION_SECONDS = 60.0
"""For each of compute-sanitizer's other tools, of what is left then."""
LAST_ROWS = 45.0
"""For the number of tokens that was begun last, and for the table of the timings."""
TIMED_OUT = 124
#: Has a small layer multiplied; fails where PyTorch would multiply instead of the kernels, and the
#: tests would all be skipped.
RUNS_HERE = """
import sys, torch
from permllm_vllm.backends import fallback_reason
sys.exit(fallback_reason(torch.device("cuda"), torch.bfloat16) or None)
"""


@dataclasses.dataclass
class Step:
    """What ran, for the closing table."""

    name: str
    outcome: str
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        return not self.outcome.startswith(("passed", "skipped"))


class Steps:
    """Runs commands until a common deadline and remembers how they ended."""

    def __init__(self, seconds: float):
        self.done: list[Step] = []
        self._begun = revision()
        self.begin(seconds)

    def begin(self, seconds: float) -> None:
        """Puts the deadline `seconds` from now."""
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds to the deadline."""
        return self._end - time.monotonic()

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        *,
        optional: bool = False,
        **environment: str,
    ) -> bool:
        """Runs a command for `limit` seconds at most, and not past the deadline; True if passed.

        What is `optional` may be left out, or stopped, for want of time.
        """
        limit = min(limit, self.left())
        if limit < 1:
            late = "skipped: no time was left" if optional else "not run: no time was left"
            self.done.append(Step(name, late))
            return False
        print("+", " ".join(command), flush=True)
        start = time.monotonic()
        status = run(command, limit, environment)
        outcome = {
            0: "passed",
            TIMED_OUT: f"{'skipped: ' if optional else ''}stopped after {limit:.0f} s",
            INCOMPLETE: "failed: not all of it was measured, see what it printed",
        }.get(status, f"failed: exit status {status}")
        self.done.append(Step(name, outcome, time.monotonic() - start))
        return status == 0

    def skip(self, name: str, reason: str) -> None:
        """Notes a step that cannot run here, and need not."""
        self.done.append(Step(name, f"skipped: {reason}"))

    def save(self, file: Path) -> None:
        """Writes how every step ended, as JSON."""
        steps = [dataclasses.asdict(step) for step in self.done]
        write_json(file, {"steps": steps}, self._begun)

    def table(self) -> str:
        width = max(len(step.name) for step in self.done)
        return "\n".join(
            f"{step.name:<{width}}  {step.seconds:>5.0f} s  {step.outcome}" for step in self.done
        )


def run(command: list[str], limit: float, environment: dict[str, str]) -> int:
    """The exit status of a command, or 124 where it and what it started were stopped."""
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **environment}, start_new_session=True
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:  # after an interruption too, which does not reach a session of its own
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def compute_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the PATH, or beside nvcc."""
    nvcc = toolkit.nvcc()
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def provide_library(steps: Steps, builds: bool) -> bool:
    """Builds for this GPU where that can be, and asks the library whether it runs; False if not.

    What follows a build has its own time, which begins here.
    """
    architecture = architectures.of_capability(*torch.cuda.get_device_capability())
    os.environ.setdefault("PERMLLM_CUDA_ARCHS", architecture)
    missing = build.missing_toolkit() if builds else "--no-build"
    if missing is None:
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if not steps.run(
            "build", command, BUILD_SECONDS, PERMLLM_BUILD_CUDA="1", PERMLLM_BUILD_CPU="0"
        ):
            return False
    elif LIBRARY.exists():
        steps.skip("build", f"{missing}; {LIBRARY.name} is used as it is")
    else:
        steps.done.append(Step("build", f"failed: {missing}"))
        return False
    steps.begin(SECONDS)
    return steps.run("the kernels run here", [sys.executable, "-c", RUNS_HERE], 60)


def measure(steps: Steps, output: Path, model: str | None, tests: bool) -> None:
    """Tests, generates and times; each whatever became of the one before."""
    files = ("tests/cuda/test_gpu.py", "tests/cuda/test_gpu_experts.py")
    pytest = [sys.executable, "-m", "pytest", "-q", *files]
    if tests:
        steps.run("tests", pytest, 240)
    name = torch.cuda.get_device_name().lower().replace(" ", "-")
    generation = [
        sys.executable, "-m", "benchmarks.cuda.generation",
        "--json", str(output / f"generation-{name}.json"),
        *(("--model", model) if model else ()),
    ]  # fmt: skip
    steps.run("generation", generation, 180)
    experts = [
        sys.executable, "-m", "benchmarks.cuda.experts",
        "--json", str(output / f"experts-{name}.json"), "--models", "olmoe-1b-7b",
        "--seconds", str(int(EXPERT_SECONDS)),
    ]  # fmt: skip
    steps.run("experts", experts, 2 * EXPERT_SECONDS)
    sanitizer = compute_sanitizer() if tests else None
    kept = SANITIZER_SECONDS if sanitizer else 0
    kernels = [
        sys.executable, "-m", "benchmarks.cuda.kernels",
        "--json", str(output / f"kernels-{name}.json"),
        "--seconds", str(max(0, int(steps.left() - kept - LAST_ROWS))),
    ]  # fmt: skip
    steps.run("kernels", kernels, steps.left() - kept)
    if sanitizer:
        sanitize(steps, sanitizer, pytest)
    elif tests:
        steps.skip("compute-sanitizer", "it is neither on the PATH nor beside nvcc")


def sanitize(steps: Steps, sanitizer: str, pytest: list[str]) -> None:
    """Runs some of the tests where every access to memory is checked, then every barrier."""
    # PyTorch asks the driver for functions that it may lack: no error of a kernel.
    command = [sanitizer, "--error-exitcode", "1", "--report-api-errors", "no"]
    steps.run(
        "compute-sanitizer",
        [*command, *pytest, "-k", SANITIZED],
        SANITIZER_SECONDS,
        optional=True,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    # A warning of racecheck is a hazard that it cannot judge, and would fail like an error.
    errors_alone = ["--racecheck-detect-level", "error"]
    for tool, options in (("synccheck", []), ("racecheck", errors_alone)):
        of_ours = ["--tool", tool, *options, "--kernel-name", "kns=permllm"]
        steps.run(
            f"compute-sanitizer, {tool}",
            [*command, *of_ours, *pytest, "-k", SYNCHRONISED],
            SYNCHRONISATION_SECONDS,
            optional=True,
        )


def main() -> None:
    """Runs everything; fails with any step."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--no-build", action="store_true", help="use the library that is there")
    parser.add_argument("--no-tests", action="store_true")
    parser.add_argument("--model", help="directory of a Llama, dense or sparse; else random")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    arguments = parser.parse_args()
    if any(arguments.output.glob("*.json")):
        parser.error(
            f"{arguments.output} has results, and a run adds nothing to them: remove them, or give "
            "another --output"
        )
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU: check nvidia-smi, and that PyTorch is one for CUDA")
    steps = Steps(BUILD_SECONDS)
    if provide_library(steps, builds=not arguments.no_build):
        measure(steps, arguments.output, arguments.model, tests=not arguments.no_tests)
    steps.save(arguments.output / "steps.json")
    print(steps.table())
    sys.exit(any(step.failed for step in steps.done))


if __name__ == "__main__":
    main()
