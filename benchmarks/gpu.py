"""What a machine with one NVIDIA GPU can tell: builds, tries, tests, generates with, times kernels.

    python -m benchmarks.gpu

Needs PyTorch, pytest and hypothesis, and to build setuptools 77 or later, nvcc and CUTLASS
(docs/cuda.md); no network. The library is built anew where it can be, else the one that is there is
used; where there is none and only CUTLASS is missing, all but its kernels is built. Results are
written to build/gpu, with the steps and how they ended, which is kept after each, and a table of
these is printed last; what the chosen steps have written there before is replaced, what others have
is kept. The exit status is 0 where every step ran and passed. A build may take 20 minutes;
--seconds are for all that follows it, and begin when it has ended.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cuda.steps import ROOT, Steps, table
from csrc.cuda import architectures, build, toolkit

LIBRARY = ROOT / "permllm_vllm" / "_C_cuda.so"
BUILD_SECONDS = 1200.0
"""For the build, which is part of no other limit."""
SECONDS = 570.0
"""Of ten minutes after the build: the rest is for the start and the closing table."""
EVERY = ("smoke", "tests", "generation", "experts", "choices", "kernels", "sanitizer")
ASKED_FOR = ("choices",)
"""Steps that run only where they are named."""
STEPS = tuple(step for step in EVERY if step not in ASKED_FOR)
ALWAYS = ("build", "the kernels run here")
SHARES = {
    "smoke": 150.0, "tests": 240.0, "generation": 180.0, "experts": 40.0, "choices": 240.0,
    "sanitizer": 150.0,
}  # fmt: skip
"""Seconds of a step at most, where others follow it; the kernels have what these leave."""
LAST_TRIAL = 35.0
"""For the kernel that was tried last."""
LAST_EXPERTS = 20.0
"""For the number of tokens that was begun last."""
LAST_ROWS = 45.0
"""The same of the kernels, and for the table of the timings."""
TEST_SECONDS = 60
"""For a test, which may wait for a kernel that hangs."""
SANITIZED = "every_weight or permute_inputs or strided or deterministic or (test_int8 and 75)"
# Our own kernels alone: linear layers of up to 64 tokens, experts of few pairs and of many.
SYNCHRONISED = "(every_weight and not 200) or one_expert"
SYNCHRONISATION_SECONDS = 60.0
"""For each of compute-sanitizer's other tools, of what is left then."""
#: Named before it runs, in case it hangs. Inductor's, which compile, come last (tests/cuda).
PYTEST = [
    *(sys.executable, "-m", "pytest", "-v"),
    *("tests/cuda/test_gpu.py", "tests/cuda/test_gpu_experts.py"),
]


def steps_of(text: str) -> tuple[str, ...]:
    """Argument type: names of EVERY, in their order.

    Raises:
        ArgumentTypeError: one is none of them.
    """
    names = text.split(",")
    for name in names:
        if name not in EVERY:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no step: give some of {','.join(EVERY)}, with commas between"
            )
    return tuple(step for step in EVERY if step in names)


def seconds_of(text: str) -> float:
    """Argument type: a positive number of seconds, at most a day.

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 86400:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no time: give seconds, more than 0 and at most 86400"
        )
    return seconds


def compute_sanitizer() -> str | None:
    """Where compute-sanitizer is: on the PATH, or beside nvcc."""
    nvcc = toolkit.nvcc()
    beside = str(Path(nvcc).resolve().parent) if nvcc else None
    return shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path=beside)


def timeouts() -> list[str]:
    """Options of pytest that end, and name, a test that hangs, where it has the plugin."""
    if importlib.util.find_spec("pytest_timeout") is None:
        return []
    return [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]  # a signal waits for CUDA


def provide_library(steps: Steps, builds: bool) -> bool:
    """Builds for this GPU where that can be; False where there is no library then."""
    architecture = architectures.of_capability(*torch.cuda.get_device_capability())
    os.environ.setdefault("PERMLLM_CUDA_ARCHS", architecture)
    missing = build.missing_compiler() if builds else "--no-build"
    no_cutlass = None if missing else build.missing_cutlass()
    if missing is None and not (no_cutlass and LIBRARY.exists()):
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        if no_cutlass:
            print(f"The build leaves out CUTLASS' kernels for many tokens: {no_cutlass}")
        name = "build, without CUTLASS" if no_cutlass else "build"
        built = steps.run(
            name,
            command,
            BUILD_SECONDS,
            # A build that is demanded fails without CUTLASS.
            PERMLLM_BUILD_CUDA="" if no_cutlass else "1",
            PERMLLM_BUILD_CPU="0",
        )
        if built and not LIBRARY.exists():  # nothing was demanded: setup.py only warned
            steps.note(name, "failed: its output says what setup.py lacks")
        return built and LIBRARY.exists()
    missing = missing or no_cutlass
    if not LIBRARY.exists():
        steps.note("build", f"failed: {missing}")
        return False
    steps.note("build", f"skipped: {missing}; {LIBRARY.name} is used as it is")
    return True


def module(name: str, file: Path, seconds: float | None = None) -> list[str]:
    """A program that writes JSON, and begins nothing further after `seconds`."""
    until = [] if seconds is None else ["--seconds", str(max(0, int(seconds)))]
    return [sys.executable, "-m", name, "--json", str(file), *until]


def results(output: Path) -> dict[str, Path]:
    """The files that steps write about this GPU."""
    gpu = torch.cuda.get_device_name().lower().replace(" ", "-")
    names = ("smoke", "generation", "experts", "kernels", "choices")
    return {name: output / f"{name}-{gpu}.json" for name in names}


def measure(steps: Steps, output: Path, model: str | None, chosen: Sequence[str]) -> None:
    """Tries, tests, generates and times; each whatever became of the one before."""
    files = results(output)
    sanitizer = compute_sanitizer() if "sanitizer" in chosen else None
    kept = SHARES["sanitizer"] if sanitizer else 0

    def limit(step: str) -> float:
        return steps.left() if step == chosen[-1] else SHARES[step]

    if "smoke" in chosen:
        smoke(steps, files["smoke"], limit("smoke"))
    if "tests" in chosen:
        steps.run(
            "tests",
            [*PYTEST, *timeouts()],
            limit("tests"),
            PYTHONFAULTHANDLER="1",
            TORCHINDUCTOR_COMPILE_THREADS="1",  # else it starts a process for every core first
        )
    if "generation" in chosen:
        generation = module("benchmarks.cuda.generation", files["generation"])
        generation += ["--model", model] if model else []
        steps.run("generation", generation, limit("generation"))
    if "experts" in chosen:
        seconds = limit("experts") - LAST_EXPERTS
        experts = module("benchmarks.cuda.experts", files["experts"], seconds)
        steps.run("experts", [*experts, "--models", "olmoe-1b-7b"], limit("experts"))
    if "choices" in chosen:
        seconds = min(limit("choices"), steps.left()) - LAST_ROWS
        choices = module("benchmarks.cuda.choices", files["choices"], seconds)
        steps.run("choices", choices, limit("choices"))
    if "kernels" in chosen:
        seconds = steps.left() - kept - LAST_ROWS
        kernels = module("benchmarks.cuda.kernels", files["kernels"], seconds)
        steps.run("kernels", kernels, steps.left() - kept)
    if sanitizer:
        sanitize(steps, sanitizer)
    elif "sanitizer" in chosen:
        steps.note("sanitizer", "skipped: it is neither on the PATH nor beside nvcc")


def smoke(steps: Steps, file: Path, limit: float) -> None:
    """Tries every kernel in a process of its own."""
    limit = min(limit, steps.left())
    steps.run(
        "smoke", module("tests.cuda.smoke", file, limit - LAST_TRIAL), limit, PYTHONFAULTHANDLER="1"
    )


def sanitize(steps: Steps, sanitizer: str) -> None:
    """Runs some of the tests where every access to memory is checked, then every barrier."""
    # PyTorch asks the driver for functions that it may lack: no error of a kernel.
    command = [sanitizer, "--error-exitcode", "1", "--report-api-errors", "no"]
    steps.run(
        "sanitizer, memcheck",
        [*command, *PYTEST, "-k", SANITIZED],
        max(SHARES["sanitizer"], steps.left() - 2 * SYNCHRONISATION_SECONDS),
        optional=True,
        PYTORCH_NO_CUDA_MEMORY_CACHING="1",
    )
    # A warning of racecheck is a hazard that it cannot judge, and would fail like an error.
    errors_alone = ["--racecheck-detect-level", "error"]
    for tool, options in (("synccheck", []), ("racecheck", errors_alone)):
        of_ours = ["--tool", tool, *options, "--kernel-name", "kns=permllm"]
        steps.run(
            f"sanitizer, {tool}",
            [*command, *of_ours, *PYTEST, "-k", SYNCHRONISED],
            SYNCHRONISATION_SECONDS,
            optional=True,
        )


def run(arguments: argparse.Namespace, steps: Steps) -> None:
    """Builds and, where the kernels run, does what is asked for."""
    if not provide_library(steps, builds=not arguments.no_build):
        return
    steps.begin(arguments.seconds)
    if steps.run(ALWAYS[1], [sys.executable, "-m", "benchmarks.cuda.check"], 60):
        measure(steps, arguments.output, arguments.model, arguments.steps)
    elif "smoke" in arguments.steps:  # which of them do not
        smoke(steps, results(arguments.output)["smoke"], steps.left())


def main() -> None:
    """Runs what is asked for; fails with any step."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--steps",
        type=steps_of,
        default=STEPS,
        metavar="STEP,STEP",
        help=f"{','.join(STEPS)}; where asked for, {','.join(ASKED_FOR)}",
    )
    parser.add_argument(
        "--seconds", type=seconds_of, default=SECONDS, help="after the build (%(default).0f)"
    )
    parser.add_argument("--no-build", action="store_true", help="use the library that is there")
    parser.add_argument("--model", help="directory of a Llama, dense or sparse; else random")
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no GPU: check nvidia-smi, and that PyTorch is one for CUDA")
    for number in (signal.SIGTERM, signal.SIGHUP):  # as an interruption does: what runs ends too
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    replaced = (*ALWAYS, *arguments.steps)
    try:
        steps = Steps(
            BUILD_SECONDS, arguments.output / "steps.json", torch.cuda.get_device_name(), replaced
        )
    except ValueError as error:
        parser.error(str(error))
    for name, file in results(arguments.output).items():
        if name in replaced:
            file.unlink(missing_ok=True)
    try:
        run(arguments, steps)
    finally:
        if steps.earlier:
            print(f"Of earlier runs:\n{table(steps.earlier)}\nOf this one:")
        print(table(steps.done), flush=True)
    sys.exit(any(step.failed for step in steps.done))


if __name__ == "__main__":
    main()
