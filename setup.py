"""Builds csrc into permllm_vllm/_C.so against libtorch's stable ABI.

The library uses no Python symbol and nothing of libtorch beyond the stable ABI of 2.11, so one
wheel, py3-none-<platform>, serves every Python and every torch from 2.11 on. Without a C++ compiler
or torch, or with PERMLLM_BUILD_CPU=0, the package is pure Python and its kernels are plain PyTorch.
"""

from __future__ import annotations

import importlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

SOURCES = Path("csrc")
OBJECTS = Path("build") / "objects"  # kept from build to build, unlike the directory of setuptools
COMMON_FLAGS = [
    "-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
    "-Wno-unused-parameter", "-I", "csrc",
    "-fno-trapping-math",  # else GCC leaves loops scalar that choose between floats
    "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_STABLE_ONLY",
]  # fmt: skip
AVX2_FLAGS = ["-mavx2", "-mfma", "-mpopcnt", "-mbmi", "-mbmi2", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl",
    "-mprefer-vector-width=512",
]  # fmt: skip
AVX2_VNNI_FLAGS = [*AVX2_FLAGS, "-mavxvnni"]
AVX512_VNNI_FLAGS = [*AVX512_FLAGS, "-mavx512vnni"]
AVX512_VBMI2_FLAGS = [*AVX512_VNNI_FLAGS, "-mavx512vbmi", "-mavx512vbmi2"]
AVX512_BF16_FLAGS = [*AVX512_VBMI2_FLAGS, "-mavx512bf16", "-mavx512bitalg"]
AMX_FLAGS = [*AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8"]
# By the beginning of a source's path in csrc/cpu, x86-64 only; the first that fits counts.
INSTRUCTION_SETS = {
    "avx2/vnni": AVX2_VNNI_FLAGS,
    "avx2/": AVX2_FLAGS,
    "avx512/vnni": AVX512_VNNI_FLAGS,
    "avx512/int8_kept": [*AVX512_VBMI2_FLAGS, "-mavx512bitalg"],
    "avx512/int8": AVX512_VBMI2_FLAGS,
    "avx512/float32": AVX512_FLAGS,
    "avx512/": AVX512_BF16_FLAGS,
    "amx/": AMX_FLAGS,
}
CPU_REMEDY = (
    "It must know C++20 and AVX-512 BF16 (GCC 11, Clang 14 or newer): choose another with CXX=..., "
    "or install without the kernels with PERMLLM_BUILD_CPU=0."
)
CUDA_LIBRARY = "permllm_vllm._C_cuda"
CUDA_REMEDY = (
    "It must be of CUDA 12.8 or newer and know this C++ compiler: choose others with CUDA_HOME=... "
    "and CXX=..., or install without the CUDA kernels with PERMLLM_BUILD_CUDA=0."
)


def compiler() -> list[str] | None:
    """The C++ compiler's command: CXX, or the first of c++, g++, clang++ that is installed."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    return [found] if found else None


def torch_directory() -> Path | None:
    """Where torch is installed, or None."""
    try:
        import torch
    except ImportError:
        return None
    return Path(torch.__file__).parent


def missing_tools() -> str | None:
    """What every library needs and is not here."""
    if sys.platform != "linux":
        return f"{sys.platform} is not Linux; build on Linux"
    if compiler() is None:
        return "no C++ compiler was found; install g++ (Debian: apt install g++) or set CXX"
    if torch_directory() is None:
        return "torch is not importable; install it and pass --no-build-isolation to pip"
    return None


def reason_not_to_build() -> str | None:
    """Why the CPU kernels cannot or must not be built here."""
    if os.environ.get("PERMLLM_BUILD_CPU", "1") == "0":
        return "PERMLLM_BUILD_CPU=0 is set; unset it"
    if sys.byteorder != "little":
        return "this processor is big-endian, and the kernels read masks as little-endian words"
    return missing_tools()


def x86() -> bool:
    """True where the x86-64 instruction sets can exist."""
    return platform.machine() in ("x86_64", "AMD64")


def sources() -> list[str]:
    """C++ sources for this machine, those of an instruction set last.

    An inline function that several files compile is linked from the first of them: the plain one.
    """
    cuda = SOURCES / "cuda"  # a library of its own, see csrc/cuda/build.py
    every = [path.as_posix() for path in SOURCES.rglob("*.cpp") if cuda not in path.parents]
    every.sort()
    every.sort(key=lambda path: bool(instruction_set_flags(path)))
    return [path for path in every if x86() or not instruction_set_flags(path)]


def instruction_set_flags(source: str) -> list[str]:
    """Flags for a file in the folder of an instruction set, none for the others."""
    path = source.removeprefix(f"{SOURCES}/cpu/")
    return next((flags for start, flags in INSTRUCTION_SETS.items() if path.startswith(start)), [])


def defines(source_list: list[str]) -> list[str]:
    """PERMLLM_AVX2, PERMLLM_AVX512 and so on, where their kernels are in the list."""
    paths = [source.removeprefix(f"{SOURCES}/cpu/") for source in source_list]
    return [
        f"-DPERMLLM_{start.rstrip('/').replace('/', '_').upper()}"
        for start in INSTRUCTION_SETS
        if any(path.startswith(start) for path in paths)
    ]


class BuildLibrary(build_ext):
    """Compiles what changed, a file at a time with its own flags, and links one shared library."""

    def get_ext_filename(self, fullname: str) -> str:
        """Without the Python tag that setuptools would add: the library serves every Python."""
        return fullname.replace(".", "/") + ".so"

    def run_command_line(self, line: list[str], remedy: str = CPU_REMEDY) -> None:
        """Runs a compiler; its own message precedes the error."""
        self.announce(shlex.join(line), level=2)
        if subprocess.run(line).returncode != 0:
            raise CompileError(f"{line[0]} failed, see above. {remedy}")

    def compile_object(self, line: list[str], target: Path, remedy: str = CPU_REMEDY) -> None:
        """Runs a command that writes `target`, unless its sources and the command are as before."""
        if not self.force and up_to_date(target, line):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        self.run_command_line(line, remedy)
        target.with_suffix(".command").write_text(shlex.join(line))

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links; an object is kept while its sources and its command are."""
        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        temporary = library.with_suffix(".so.new")  # a running process keeps the old library
        if ext.name == CUDA_LIBRARY:
            self.build_cuda(temporary)
        else:
            self.build_cpu(ext, temporary)
        temporary.replace(library)

    def build_cuda(self, library: Path) -> None:
        """Compiles csrc/cuda."""
        torch, command = torch_directory(), compiler()
        assert torch is not None
        assert command is not None
        sys.stderr.write(f"{cuda_build().announcement()}\n")
        cuda_build().build(
            compile_source=lambda line, target: self.compile_object(line, target, CUDA_REMEDY),
            link=lambda line: self.run_command_line(line, CUDA_REMEDY),
            compiler=command,
            flags=[*COMMON_FLAGS, "-isystem", str(torch / "include")],
            torch=torch,
            objects=OBJECTS / "cuda",
            library=library,
        )

    def build_cpu(self, ext: Extension, library: Path) -> None:
        """Compiles everything else."""
        torch = torch_directory()
        command = compiler()
        assert torch is not None
        assert command is not None
        flags = [*COMMON_FLAGS, *defines(ext.sources), "-isystem", str(torch / "include")]

        def build(source: str) -> Path:
            target = OBJECTS / Path(source).relative_to(SOURCES).with_suffix(".o")
            line = [*command, *flags, *instruction_set_flags(source), "-MD", "-c", source,
                    "-o", str(target)]  # fmt: skip
            self.compile_object(line, target)
            return target

        with ThreadPoolExecutor(self.parallel or min(os.cpu_count() or 1, 8)) as pool:
            objects = list(pool.map(build, ext.sources))
        link = [*command, "-shared", "-o", str(library), *map(str, objects),
                f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,--no-undefined"]  # fmt: skip
        self.run_command_line(link)


def up_to_date(target: Path, command: list[str]) -> bool:
    """True when `target` was built by this command from files that have not changed since."""
    record, dependencies = target.with_suffix(".command"), target.with_suffix(".d")
    if not (target.exists() and dependencies.exists() and record.exists()):
        return False
    if record.read_text() != shlex.join(command):
        return False
    built = target.stat().st_mtime
    files = dependencies.read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(Path(file).exists() and Path(file).stat().st_mtime <= built for file in files)


class FreshBuild(build):
    """Starts from an empty directory: whatever an older build left there would be in the wheel."""

    def run(self) -> None:
        """Removes what was built before, except for the objects."""
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library depends on the platform alone."""

    def get_tag(self) -> tuple[str, str, str]:
        """The platform of a library, or any where there is none."""
        _, _, tag = super().get_tag()
        return "py3", "none", tag


def cuda_build() -> ModuleType:
    """csrc/cuda/build.py; pip does not put this directory on Python's path."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    return importlib.import_module("csrc.cuda.build")


def extensions() -> list[Extension]:
    """The libraries, or fewer and a warning that says how to get them.

    Raises:
        RuntimeError: PERMLLM_BUILD_CUDA=1 and something is missing.
    """
    libraries = []
    cpu_reason = reason_not_to_build()
    if cpu_reason is None:
        libraries.append(Extension("permllm_vllm._C", sources()))
    else:
        sys.stderr.write(
            "WARNING: permllm-vllm is installed without its CPU kernels: "
            f"{cpu_reason}, and install again. Until then sparse layers run as dense PyTorch on "
            "CPUs: no faster and no smaller than dense.\n"
        )
    cuda_reason = cuda_build().reason_not_to_build(missing_tools())
    if cuda_reason is None:
        libraries.append(Extension(CUDA_LIBRARY, []))
    else:
        sys.stderr.write(f"permllm-vllm is installed without CUDA kernels: {cuda_reason}.\n")
    return libraries


setup(
    ext_modules=extensions(),
    cmdclass={"build": FreshBuild, "build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
)
