"""Compiles csrc/cuda with nvcc to one library, with any PyTorch from 2.11 on, also one for the CPU.

Environment variables:
    PERMLLM_BUILD_CUDA: 1 builds or fails, 0 never builds. Unset, the library is built where nvcc is
        found, without CUTLASS' kernels where the headers of CUTLASS are not.
    PERMLLM_CUDA_ARCHS: for which GPUs (csrc/cuda/architectures.py).
    PERMLLM_CUTLASS_DIR: where CUTLASS is (csrc/cuda/toolkit.py).
    MAX_JOBS: compilers at a time at most (csrc/cuda/jobs.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from csrc.cuda import toolkit
from csrc.cuda.architectures import architectures, chosen, of_gpus_here
from csrc.cuda.jobs import Jobs, jobs

SOURCES = Path("csrc/cuda")
NVCC_FLAGS = [
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-DNDEBUG",
    "-Xcompiler", "-fPIC,-fvisibility=hidden",
]  # fmt: skip
# Without GDC, CUTLASS would launch its kernels early and never wait for the one before.
CUTLASS_FLAGS = ["-DCUTLASS_ENABLE_GDC_FOR_SM90=1", "-DCUTLASS_ENABLE_GDC_FOR_SM100=1"]
#: The kernels of CUTLASS, and the architectures that have their instructions. One is enough, the
#: first that a build names: 100f runs on 10.0 and 10.3, 100a on 10.0 alone.
CUTLASS_KERNELS = {"sm90": ("90a",), "sm100": ("100f", "100a")}

Compile = Callable[[list[str], Path], None]
Task = Callable[[], None]


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
    missing = missing or (missing_toolkit() if wish == "1" else missing_compiler())
    if missing and wish == "1":
        raise RuntimeError(f"PERMLLM_BUILD_CUDA=1 is set, but {missing}")
    return missing


def missing_compiler() -> str | None:
    """What of nvcc and its libraries is not here, and what to do about it."""
    compiler = toolkit.nvcc()
    if compiler is None:
        return "nvcc was not found; install the CUDA toolkit 12.8 or later, or set CUDA_HOME"
    if toolkit.nvcc_version() < toolkit.LEAST_NVCC:
        return f"{compiler} is older than CUDA 12.8; install a newer toolkit, or set CUDA_HOME"
    if not toolkit.library_directories():
        return "libcudart_static.a was not found beside nvcc; set CUDA_HOME to the CUDA toolkit"
    return None


def missing_toolkit() -> str | None:
    """What is not here of all that a whole build takes, and what to do about it."""
    return missing_compiler() or missing_cutlass()


def missing_cutlass() -> str | None:
    """Why the kernels of CUTLASS cannot be built, where the architectures have any."""
    if cutlass_kernels(architectures()) and toolkit.cutlass() is None:
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
    cutlass = missing_cutlass()
    return (
        f"permllm-vllm: compiling the CUDA kernels with {toolkit.nvcc()} ({wish}), for "
        f"{' '.join(architectures())} ({choice}). This takes minutes: PERMLLM_BUILD_CUDA=0 leaves "
        "them out, PERMLLM_CUDA_ARCHS names other architectures."
        + (f" CUTLASS' GEMMs for many tokens are left out: {cutlass}." if cutlass else "")
    )


def cutlass_kernels(names: Sequence[str]) -> dict[str, str]:
    """The kernels of CUTLASS that `names` can have, and the architecture each is compiled for."""
    return {
        kernel: next(name for name in able if name in names)
        for kernel, able in CUTLASS_KERNELS.items()
        if not set(able).isdisjoint(names)
    }


def built_cutlass_kernels(names: Sequence[str]) -> dict[str, str]:
    """Those of them in a build on this machine: none without the headers."""
    return cutlass_kernels(names) if toolkit.cutlass() else {}


def definitions(names: Sequence[str]) -> list[str]:
    """What tells the bindings which kernels a build for `names` has."""
    built = built_cutlass_kernels(names)
    kernels = [f"-DPERMLLM_{kernel.upper()}" for kernel in built]
    family = ["-DPERMLLM_SM103"] if built.get("sm100") == "100f" else []
    return [f'-DPERMLLM_CUDA_ARCHITECTURES="{" ".join(names)}"', *kernels, *family]


def sources(names: Sequence[str]) -> tuple[dict[Path, str], list[Path]]:
    """What a build for `names` compiles: with CUTLASS, for one architecture each, and for all."""
    of_cutlass = {
        source: kernel
        for kernel in CUTLASS_KERNELS
        for source in sorted(SOURCES.glob(f"many_tokens_{kernel}_*.cu"))
    }
    built = built_cutlass_kernels(names)
    heavy = {source: built[kernel] for source, kernel in of_cutlass.items() if kernel in built}
    return heavy, [path for path in sorted(SOURCES.glob("*.cu")) if path not in of_cutlass]


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
    those of C++ sources that include libtorch. How many run at a time is in csrc/cuda/jobs.py.
    """
    names = architectures()
    heavy, light = sources(names)

    def target(source: Path) -> Path:
        # By architectures: a build for a few of them keeps the objects of the others.
        return objects / f"{source.stem}.{heavy.get(source, '-'.join(names))}.o"

    def compile_cuda(source: Path) -> None:
        line = [toolkit.nvcc() or "nvcc", *NVCC_FLAGS, *host_compiler(compiler)]
        if source in heavy:
            line += [*CUTLASS_FLAGS, "-isystem", str((toolkit.cutlass() or Path()) / "include")]
            line += code_generation([heavy[source]])
        else:
            line += code_generation(names)
        compile_source([*line, "-MD", "-c", str(source), "-o", str(target(source))], target(source))

    def compile_bindings(source: Path) -> None:
        cpp = [*compiler, *flags, *definitions(names), "-MD", "-c", str(source)]
        compile_source([*cpp, "-o", str(target(source))], target(source))

    bindings = sorted(SOURCES.glob("*bindings.cpp"))
    run_all(
        [partial(compile_cuda, source) for source in heavy],
        [
            *(partial(compile_bindings, path) for path in bindings),
            *(partial(compile_cuda, path) for path in light),
        ],
        jobs(),
    )
    link(
        [
            *compiler, "-shared", "-o", str(library),
            *(str(target(source)) for source in [*heavy, *light, *bindings]),
            *(f"-L{path}" for path in toolkit.library_directories()),
            "-lcudart_static", "-lrt", "-ldl", "-lpthread",
            f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined",
            "-Wl,--exclude-libs,ALL",
        ]
    )  # fmt: skip


def run_all(heavy: Sequence[Task], light: Sequence[Task], at_a_time: Jobs) -> None:
    """Runs every task, those of CUTLASS beside the others; what fails ends it."""
    with (
        ThreadPoolExecutor(at_a_time.cutlass) as first,
        ThreadPoolExecutor(at_a_time.others or 1) as second,
    ):
        beside = second if at_a_time.others else first
        started = [first.submit(task) for task in heavy] + [beside.submit(task) for task in light]
        try:
            for task in as_completed(started):
                task.result()
        except BaseException:
            for task in started:
                task.cancel()
            raise


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
