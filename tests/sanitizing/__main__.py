"""`make sanitize`: csrc/cpu under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer.

The harness runs under all of them. The operators run under the first two, driven by the kernel
tests and the quick fuzzing of the operators; not under the third, because the OpenMP runtime of
torch is not instrumented and would be reported as one race after the other.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.sanitizing.build import MEMORY, ROOT, THREADS, build_harness, build_library, runtime

FOLDER = ROOT / "build" / "sanitized"
PLANTS = {"overflow": MEMORY, "undefined": MEMORY, "race": THREADS}
REPORTS = {
    "overflow": "heap-buffer-overflow",
    "undefined": "runtime error: shift exponent",
    "race": "ThreadSanitizer: data race",
}
TESTS = ("tests/kernels/test_cpu.py", "tests/kernels/test_border.py")
FUZZED = "test_no_input_is_answered_wrongly and (linear or pack or contents)"
LINKED = ("tests", "benchmarks", "offline", "csrc", "pyproject.toml", "setup.py")
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def harness_calls(program: Path) -> int:
    """Run the harness; raises SystemExit with the sanitizer's report."""
    result = subprocess.run(
        [program], capture_output=True, text=True, env={**os.environ, **OPTIONS}
    )
    found = re.search(r"harness: (\d+) calls", result.stdout)
    if result.returncode != 0 or found is None:
        raise SystemExit(f"{program.name} failed:\n{result.stdout}{result.stderr[-8000:]}")
    print(f"{program.name}: {result.stdout.strip()}", flush=True)
    return int(found[1])


def require_report(program: Path, plant: str) -> None:
    """Raise SystemExit unless the sanitizer reports a planted bug."""
    result = subprocess.run(
        [program, plant], capture_output=True, text=True, env={**os.environ, **OPTIONS}
    )
    if result.returncode == 0 or REPORTS[plant] not in result.stderr:
        raise SystemExit(f"the planted {plant} was not reported:\n{result.stderr[-4000:]}")
    print(f"planted {plant}: reported", flush=True)


def mirror() -> Path:
    """A copy of the tree whose package has the sanitized library in the place of its own."""
    tree = FOLDER / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir(parents=True)
    for name in LINKED:
        (tree / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "permllm_vllm", tree / "permllm_vllm", ignore=_libraries)
    build_library(MEMORY, tree / "permllm_vllm" / "_C.so")
    return tree


def _libraries(_: str, names: list[str]) -> list[str]:
    return [name for name in names if name.endswith(".so") or name == "__pycache__"]


def operator_tests(tree: Path) -> int:
    """Run tests with the sanitized operators; returns how many passed."""
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "PYTHONPATH": f"{tree}:{tree / 'offline'}",
        "OMP_NUM_THREADS": "2",
    }
    passed = 0
    for selection in ([*TESTS], ["tests/fuzzing/test_targets.py", "-k", FUZZED]):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=900"]
        result = subprocess.run(
            [*command, *selection], cwd=tree, env=environment, capture_output=True, text=True
        )
        found = re.search(r"(\d+) passed", result.stdout)
        if result.returncode != 0 or found is None:
            report = (result.stdout + result.stderr)[-12000:]
            raise SystemExit(f"{' '.join(selection)} failed:\n{report}")
        print(f"{' '.join(selection)}: {found[0]}", flush=True)
        passed += int(found[1])
    return passed


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    programs = {
        MEMORY: build_harness(MEMORY, FOLDER / "harness-memory"),
        THREADS: build_harness(THREADS, FOLDER / "harness-threads"),
    }
    calls = sum(harness_calls(program) for program in programs.values())
    for plant, sanitizer in PLANTS.items():
        require_report(programs[sanitizer], plant)
    passed = operator_tests(mirror())
    print(
        f"sanitize: {calls} kernel calls in the harness, {passed} operator tests, "
        f"{len(PLANTS)} planted bugs reported, 0 reports"
    )


if __name__ == "__main__":
    main()
