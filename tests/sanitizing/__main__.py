"""`make sanitize`: csrc/cpu under AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer.

The harness runs under all of them. The operators run under the first two, driven by the kernel
tests and the quick fuzzing of the operators, and so do the AMX kernels on the emulated tile unit,
driven by their tests; not under the third, because the OpenMP runtime of
torch is not instrumented and would be reported as one race after the other. Bugs are planted in the
harness and in the library: each must be reported. The CUDA kernels are not watched: their emulator
switches stacks, which these sanitizers do not follow.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.records.machine import revision, write_json
from tests.kernels.amx.emulated import INSTRUCTION_SETS, compile_emulation, cpu_flags
from tests.mirror import mirror
from tests.sanitizing.build import (
    MEMORY,
    OPTIONS,
    ROOT,
    THREADS,
    build_harness,
    compile_kernels,
    compile_operators,
    compile_with_overflow,
    link_library,
    run_harness,
    runtime,
    setup_module,
)

FOLDER = ROOT / "build" / "sanitized"
EMULATION = FOLDER / "libemulation.so"
INSTRUMENTED = (b"__asan_report_load", b"__ubsan_handle")
# A wide access that begins inside is called unknown-crash in the report's first line.
OVERFLOW = r"AddressSanitizer: (?s:.*) bytes after \d+-byte region"
# Weights lie side by side in one mapping, with poisoned bytes between them.
OVERFLOW_OF_WEIGHT = "AddressSanitizer: (use-after-poison|unknown-crash)"
REPORTS = {
    "overflow": (MEMORY, OVERFLOW),
    "undefined": (MEMORY, "runtime error: shift exponent"),
    "race": (THREADS, "ThreadSanitizer: data race"),
}
# The overflow planted in the library shows at the border; other tests fail of it in other ways.
KERNELS = (
    *(
        "border",
        "cpu",
        "int8",
        "dense8",
        "activations",
        "head",
        "twelve_bits",
        "four_bits",
        "lanes",
        "damage",
    ),
    "experts",
)
KERNEL_TESTS = tuple(f"tests/kernels/test_{name}.py" for name in KERNELS)
FUZZED = "test_no_input_is_answered_wrongly and (linear or pack or contents)"
# One compiles anew, the other takes minutes at this speed and reaches no other line.
AMX_TESTS = ("tests/kernels/amx", "-k", "not compiles_for_the_hardware and not largest_sums")
SELECTIONS = (KERNEL_TESTS, AMX_TESTS, ("tests/fuzzing/test_targets.py", "-k", FUZZED))
SECONDS = 900  # for one run of tests, on a busy machine
WHICH_LIBRARY = """
import permllm_vllm, permllm_vllm.ops
assert not permllm_vllm.ops.missing_reason, permllm_vllm.ops.missing_reason
print(permllm_vllm.__file__)
print(*{line.split()[-1] for line in open("/proc/self/maps") if "/permllm_vllm/_C.so" in line})
"""


def harness_calls(program: Path) -> int:
    """Run the harness; raises SystemExit with the sanitizer's report."""
    result = run_harness(program)
    found = re.search(r"harness: (\d+) calls", result.stdout)
    if result.returncode != 0 or found is None or int(found[1]) == 0:
        raise SystemExit(f"{program.name} failed:\n{result.stdout}{result.stderr[-8000:]}")
    print(f"{program.name}: {result.stdout.strip()}", flush=True)
    return int(found[1])


def require_report(program: Path, plant: str, report: str) -> None:
    """Raise SystemExit unless the sanitizer reports a planted bug of the harness."""
    result = run_harness(program, plant)
    if result.returncode == 0 or re.search(report, result.stderr) is None:
        raise SystemExit(f"the planted {plant} was not reported:\n{result.stderr[-4000:]}")
    print(f"planted {plant}: reported", flush=True)


def sanitized_tree(objects: Sequence[Path], name: str) -> Path:
    """A copy of the tree whose package has a sanitized library in the place of its own."""
    tree = FOLDER / name
    link_library(MEMORY, objects, mirror(tree))
    require_library(tree)
    return tree


def emulated() -> bool:
    """Whether this machine runs the AMX kernels on the emulated tile unit."""
    return shutil.which("g++") is not None and cpu_flags() >= INSTRUCTION_SETS


def build_emulation() -> None:
    """Compile them with their emulation; raises SystemExit unless they are watched."""
    compile_emulation(EMULATION, [f"-fsanitize={MEMORY[0]}", *MEMORY[1:], "-g1"])
    content = EMULATION.read_bytes()
    if not all(name in content for name in INSTRUMENTED):
        raise SystemExit(f"{EMULATION} lacks one of {INSTRUMENTED}: it is not watched")


def python(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a mirrored tree, the sanitizers' libraries loaded before its own."""
    environment = {
        **os.environ,
        **OPTIONS,
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        "PYTHONPATH": f"{tree}:{tree / 'offline'}",
        "OMP_NUM_THREADS": "2",
        "PERMLLM_AMX_EMULATION": str(EMULATION),
    }
    return subprocess.run(
        [sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True
    )


def require_library(tree: Path) -> None:
    """Raise SystemExit unless Python loads the tree's package and library, and no other."""
    result = python(tree, "-c", WHICH_LIBRARY)
    package = tree / "permllm_vllm"
    expected = [str(package / "__init__.py"), str(package / "_C.so")]
    if result.returncode != 0 or result.stdout.split() != expected:
        found = result.stdout + result.stderr[-4000:]
        raise SystemExit(f"the sanitized library is not what is tested:\n{found}")


def run_tests(tree: Path, selection: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run tests in a mirrored tree; what a sanitizer writes is not captured by pytest."""
    options = ["-q", "-p", "no:cacheprovider", "--capture=sys", f"--timeout={SECONDS}"]
    return python(tree, "-m", "pytest", *options, *selection)


def report(result: subprocess.CompletedProcess[str]) -> str:
    """What a sanitizer says first, or the end of what pytest says."""
    found = re.search(r"[^\n]*(Sanitizer|runtime error:)(?s:.*)", result.stderr)
    return result.stdout[-6000:] + (result.stderr[-6000:] if found is None else found[0][:6000])


def passed_tests(tree: Path) -> int:
    """Run the operators' tests; raises SystemExit with the report."""
    passed = 0
    for selection in SELECTIONS:
        if selection == AMX_TESTS and not emulated():
            print("AMX: the emulation needs g++, and AVX-512 with BF16 and VBMI2", flush=True)
            continue
        result = run_tests(tree, selection)
        found = re.search(r"(\d+) passed", result.stdout)
        if result.returncode != 0 or found is None or "Sanitizer" in result.stderr:
            raise SystemExit(f"{' '.join(selection)} failed:\n{report(result)}")
        print(f"{' '.join(selection)}: {found[0]}", flush=True)
        passed += int(found[1])
    return passed


def require_failure(tree: Path) -> None:
    """Raise SystemExit unless the same tests report the overflow in this tree's library."""
    result = run_tests(tree, ["-x", *KERNEL_TESTS])
    if result.returncode == 0 or re.search(OVERFLOW_OF_WEIGHT, result.stderr) is None:
        report = (result.stdout + result.stderr)[-4000:]
        raise SystemExit(f"the overflow planted in the library was not reported:\n{report}")
    print("planted overflow in the library: reported", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.sanitizing", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the counts to a file")
    options = parser.parse_args()
    reason = setup_module().reason_not_to_build()
    if reason:
        raise SystemExit(f"nothing can be sanitized: {reason}")
    started, begun = time.perf_counter(), revision()
    shutil.rmtree(FOLDER, ignore_errors=True)
    kernels = compile_kernels(MEMORY, FOLDER / "memory")
    programs = {
        MEMORY: build_harness(MEMORY, kernels, FOLDER / "harness-memory"),
        THREADS: build_harness(
            THREADS, compile_kernels(THREADS, FOLDER / "threads"), FOLDER / "harness-threads"
        ),
    }
    calls = sum(harness_calls(program) for program in programs.values())
    for plant, (sanitizer, report) in REPORTS.items():
        require_report(programs[sanitizer], plant, report)
    objects = [*compile_operators(MEMORY, FOLDER / "operators"), *kernels]
    broken = compile_with_overflow(MEMORY, FOLDER / "planted")
    right = [path for path in objects if not path.name.endswith("weight_memory.cpp.o")]
    require_failure(sanitized_tree([broken, *right], "planted-tree"))
    if emulated():
        build_emulation()
    passed = passed_tests(sanitized_tree(objects, "tree"))
    planted = len(REPORTS) + 1
    if options.json is not None:
        payload = {
            "seconds": round(time.perf_counter() - started, 1),
            "kernel_calls": calls,
            "operator_tests": passed,
            "planted_bugs_reported": planted,
            "reports": 0,
        }
        write_json(options.json, payload, begun)
    print(
        f"sanitize: {calls} kernel calls in the harness, {passed} operator tests, "
        f"{planted} planted bugs reported, 0 reports"
    )


if __name__ == "__main__":
    main()
