"""Compiles csrc/cuda with nvcc to one library, with any PyTorch from 2.11 on, also one for the CPU.

Environment variables:
    PERMLLM_BUILD_CUDA: 1 builds or fails, 0 never builds. Unset, the library is built where
        nvcc and what else it takes are found.
    PERMLLM_CUDA_ARCHS: for which GPUs (csrc/cuda/architectures.py).
    PERMLLM_CUTLASS_DIR: where CUTLASS is (csrc/cuda/toolkit.py).
    MAX_JOBS: compilers at a time at most; 2 by default, of which one may take 8 GiB of memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csrc.cuda import toolkit
from csrc.cuda.architectures import architectures, chosen, of_gpus_here

SOURCES = Path("csrc/cuda")
NVCC_FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG",
    "-Xcompiler", "-fPIC,-fvisibility=hidden",
]  # fmt: skip
GEMM_SM90 = SOURCES / "gemm_sm90.cu"
"""The one source that includes CUTLASS, and is compiled for one architecture alone."""
SM90 = "90a"

Compile = Callable[[list[str], Path], None]


def reason_not_to_build(missing: str | None = None) -> str | None:
    """Why the CUDA kernels are not built here, None where they are.

    Args:
        missing: what else is not here, and what to do about it.

    Raises:
        RuntimeError: PERMLLM_BUILD_CUDA=1 and something is missing.
    """
    wish = os.environ.get("PERMLLM_BUILD_CUDA", "")
    if wish == "0":
        return "PERMLLM_BUILD_CUDA=0 is set; unset it"
    missing = missing or missing_toolkit()
    if missing and wish == "1":
        raise RuntimeError(f"PERMLLM_BUILD_CUDA=1 is set, but {missing}")
    return missing


def missing_toolkit() -> str | None:
    """What the build takes and is not here, and what to do about it."""
    compiler = toolkit.nvcc()
    if compiler is None:
        return "nvcc was not found; install the CUDA toolkit 12.8 or later, or set CUDA_HOME"
    if toolkit.nvcc_version() < toolkit.LEAST_NVCC:
        return f"{compiler} is older than CUDA 12.8; install a newer toolkit, or set CUDA_HOME"
    if not toolkit.library_directories():
        return "libcudart_static.a was not found beside nvcc; set CUDA_HOME to the CUDA toolkit"
    if SM90 in architectures() and toolkit.cutlass() is None:
        return toolkit.cutlass_missing()
    return None


def announcement() -> str:
    """What is going to be compiled, why, and how to do without: it takes minutes."""
    demanded = os.environ.get("PERMLLM_BUILD_CUDA") == "1"
    wish = "PERMLLM_BUILD_CUDA=1 is set" if demanded else "it was found"
    if chosen():
        choice = "PERMLLM_CUDA_ARCHS is set"
    else:
        choice = "what the GPUs here run" if of_gpus_here() else "no such GPU is here: all"
    return (
        f"permllm-vllm: compiling the CUDA kernels with {toolkit.nvcc()} ({wish}), for "
        f"{' '.join(architectures())} ({choice}). This takes minutes: PERMLLM_BUILD_CUDA=0 leaves "
        "them out, PERMLLM_CUDA_ARCHS names other architectures."
    )


def jobs() -> int:
    """Compilers at a time: MAX_JOBS, or two.

    Raises:
        ValueError: MAX_JOBS is no positive number.
    """
    most = os.environ.get("MAX_JOBS", "").strip() or "2"
    if not re.fullmatch(r"[1-9]\d*", most):
        raise ValueError(f"MAX_JOBS is {most!r}: it must be a positive number; correct or unset it")
    return int(most)


def definitions(names: Sequence[str]) -> list[str]:
    """What tells the bindings which kernels a build for `names` has."""
    gemm = ["-DPERMLLM_SM90"] if SM90 in names else []
    return [f'-DPERMLLM_CUDA_ARCHITECTURES="{" ".join(names)}"', *gemm]


def sources(names: Sequence[str]) -> list[Path]:
    """What nvcc compiles for `names`; what takes longest first."""
    every = sorted(SOURCES.glob("*.cu"), key=lambda path: (path != GEMM_SM90, path))
    return [path for path in every if path != GEMM_SM90 or SM90 in names]


def build(
    compile_source: Compile,
    link: Callable[[list[str]], None],
    compiler: Sequence[str],
    flags: Sequence[str],
    torch: Path,
    objects: Path,
    library: Path,
) -> None:
    """Compiles every source and links `library`.

    `compile_source` runs a command that writes an object, where it is out of date; `flags` are
    those of C++ sources that include libtorch.
    """
    names = architectures()

    def compile_one(source: Path) -> Path:
        own = [SM90] if source == GEMM_SM90 else names
        # By architectures: a build for a few of them keeps the objects of the others.
        target = objects / f"{source.stem}.{'-'.join(own)}.o"
        if source.suffix == ".cpp":
            line = [*compiler, *flags, *definitions(names)]
        else:
            line = [toolkit.nvcc() or "nvcc", *NVCC_FLAGS, *host_compiler(compiler)]
            line += code_generation(own)
        if source == GEMM_SM90:
            line += ["-isystem", str((toolkit.cutlass() or Path()) / "include")]
        compile_source([*line, "-MD", "-c", str(source), "-o", str(target)], target)
        return target

    with ThreadPoolExecutor(jobs()) as pool:
        built = list(pool.map(compile_one, [*sources(names), SOURCES / "bindings.cpp"]))
    link(
        [
            *compiler, "-shared", "-o", str(library),
            *map(str, built),
            *(f"-L{path}" for path in toolkit.library_directories()),
            "-lcudart_static", "-lrt", "-ldl", "-lpthread",
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined",
            "-Wl,--exclude-libs,ALL",
        ]
    )  # fmt: skip


def host_compiler(compiler: Sequence[str]) -> list[str]:
    """nvcc's option for the compiler that CXX names; its own choice where that is not set."""
    return ["-ccbin", compiler[-1]] if os.environ.get("CXX") else []


def code_generation(names: Sequence[str]) -> list[str]:
    """nvcc's options for machine code of every architecture, and PTX of the last."""
    flags = []
    for name in names:
        flags += ["-gencode", f"arch=compute_{name},code=sm_{name}"]
    if names[-1].isdigit():
        flags += ["-gencode", f"arch=compute_{names[-1]},code=compute_{names[-1]}"]
    return flags
