"""Build csrc/cpu once more, watched by a sanitizer: the harness, and the library of operators."""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
HARNESS = ROOT / "tests" / "sanitizing" / "harness.cpp"
NOT_IN_HARNESS = (  # need torch, its threads
    *("bindings.cpp", "experts_bindings.cpp", "head_bindings.cpp"),
    "norm_bindings.cpp",
    "threads.cpp",
)
MEMORY = ("address,undefined", "-fno-sanitize-recover=all")
THREADS = ("thread",)
OPTIONS = {
    # Frames of the fake stack are not aligned for vectors of 64 bytes: GCC's bug 110027.
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:detect_stack_use_after_return=0",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def setup_module() -> ModuleType:
    """setup.py, for its compiler, sources and flags; its call of setup() does nothing here."""
    spec = importlib.util.spec_from_file_location("permllm_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with mock.patch("setuptools.setup"):
        spec.loader.exec_module(module)
    return module


def sources(setup: ModuleType, wanted: str = "") -> list[str]:
    """C++ sources of the CPU kernels; with `wanted`, no instruction set but the portable one."""
    every: list[str] = setup.sources()
    if wanted == "portable":
        every = [source for source in every if not setup.instruction_set_flags(source)]
    return every


def compile_all(
    sanitizer: Sequence[str], source_list: Sequence[str], objects: Path, wanted: str = ""
) -> list[Path]:
    """Compile sources, each with setup.py's flags for it; returns the objects in their order."""
    setup = setup_module()
    objects.mkdir(parents=True, exist_ok=True)
    sanitize = [f"-fsanitize={sanitizer[0]}", *sanitizer[1:], "-g1", "-O1"]
    flags = [flag for flag in setup.COMMON_FLAGS if flag != "-O3"]
    flags += [*sanitize, *setup.defines(sources(setup, wanted))]
    flags += ["-isystem", str(setup.torch_directory() / "include")]

    def build(source: str) -> Path:
        target = objects / (source.strip("/").replace("/", "-") + ".o")  # a name is in many folders
        own = setup.instruction_set_flags(source)
        run([*setup.compiler(), *flags, *own, "-c", source, "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(build, source_list))


def compile_kernels(sanitizer: Sequence[str], objects: Path, wanted: str = "") -> list[Path]:
    """All that does not need torch, plain sources first."""
    every = sources(setup_module(), wanted)
    chosen = [source for source in every if Path(source).name not in NOT_IN_HARNESS]
    return compile_all(sanitizer, chosen, objects, wanted)


def build_harness(
    sanitizer: Sequence[str], kernels: Sequence[Path], target: Path, wanted: str = ""
) -> Path:
    """The stand-alone program under a sanitizer."""
    folder = target.parent / f"{target.name}-objects"
    objects = [*kernels, *compile_all(sanitizer, [str(HARNESS)], folder, wanted)]
    link(objects, sanitizer, target, ["-pthread"])
    return target


def run_harness(program: Path, *plant: str) -> subprocess.CompletedProcess[str]:
    """Run the stand-alone program, with a planted bug if one is named.

    What the caller preloads (vLLM preloads an allocator) would come before the sanitizer's own.
    """
    environment = {**os.environ, **OPTIONS}
    environment.pop("LD_PRELOAD", None)
    return subprocess.run([program, *plant], capture_output=True, text=True, env=environment)


def compile_operators(sanitizer: Sequence[str], objects: Path) -> list[Path]:
    """The rest of the library that torch loads."""
    every = sources(setup_module())
    return compile_all(sanitizer, [s for s in every if Path(s).name in NOT_IN_HARNESS], objects)


def link_library(sanitizer: Sequence[str], objects: Sequence[Path], target: Path) -> Path:
    """The library that torch loads, under a sanitizer."""
    lib = setup_module().torch_directory() / "lib"
    link(objects, sanitizer, target, ["-shared", f"-L{lib}", "-ltorch_cpu", "-lc10"])
    return target


def compile_with_overflow(sanitizer: Sequence[str], folder: Path) -> Path:
    """Compile weight_memory.cpp so that a weight lacks its last line; returns the object."""
    text = (ROOT / "csrc" / "cpu" / "memory" / "weight_memory.cpp").read_text()
    right, wrong = "unpoison(data, bytes);", "unpoison(data, bytes - kAlignment);"
    if text.count(right) != 1:
        raise RuntimeError(
            f"weight_memory.cpp has {right!r} {text.count(right)} times; plant another bug"
        )
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "weight_memory.cpp"
    source.write_text(text.replace(right, wrong))
    return compile_all(sanitizer, [str(source)], folder)[0]


def link(
    objects: Sequence[Path], sanitizer: Sequence[str], target: Path, flags: Sequence[str]
) -> None:
    command = [*setup_module().compiler(), f"-fsanitize={sanitizer[0]}", *sanitizer[1:]]
    run([*command, *map(str, objects), *flags, "-o", str(target)])


def run(command: Sequence[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if result.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} failed:\n{result.stderr[-4000:]}")


def runtime(name: str) -> str:
    """Path of a sanitizer's library, to load before Python's own."""
    command = [*setup_module().compiler(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
