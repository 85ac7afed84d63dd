"""Build csrc/cpu once more, its AVX-512, AVX-VNNI and AMX instructions in software."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from tests.mirror import ROOT
from tests.sanitizing.build import run, setup_module

HEADER = Path(__file__).parent / "avx512.h"
TILES = ROOT / "tests" / "kernels" / "amx"
BFLOAT16 = "-mavx512bf16"


def flags_of(setup: ModuleType, source: str) -> list[str]:
    """The flags of a source: those of AVX2 alone, and what replaces instructions beyond it."""
    own = setup.instruction_set_flags(source)
    if not set(own) - set(setup.AVX2_FLAGS):
        return list(own)
    bfloat16 = ["-DPERMLLM_TARGET_BF16"] if BFLOAT16 in own else []
    return [*setup.AVX2_FLAGS, "-include", str(HEADER), "-Wno-psabi", *bfloat16]


def build_library(objects: Path, target: Path) -> None:
    """Compile what changed and link the library that torch loads."""
    setup = setup_module()
    objects.mkdir(parents=True, exist_ok=True)
    torch = setup.torch_directory()
    sources = setup.sources()
    flags = [flag for flag in setup.COMMON_FLAGS if flag != "-O3"]
    flags += ["-O2", *setup.defines(sources), "-isystem", str(torch / "include")]
    flags += ["-DPERMLLM_EMULATED", "-DPERMLLM_EMULATE_AMX", "-I", str(TILES)]

    def build(source: str) -> Path:
        made = objects / f"{source.replace('/', '-')}.o"
        line = [*setup.compiler(), *flags, *flags_of(setup, source), "-MD", "-c", source,
                "-o", str(made)]  # fmt: skip
        if not setup.up_to_date(made, line):
            run(line)
            made.with_suffix(".command").write_text(shlex.join(line))
        return made

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = list(pool.map(build, sources))
    link = [*setup.compiler(), "-shared", "-o", str(target), *map(str, made)]
    run([*link, f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined"])


def pytest(tree: Path, *arguments: str) -> int:
    """Run tests in a mirrored tree; the exit status."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{tree}:{tree / 'offline'}",
        "OMP_NUM_THREADS": "2",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=tree, env=environment).returncode
