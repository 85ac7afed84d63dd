"""Builds the host programs and the library that the tests of this directory load."""

import ctypes
import importlib.util
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from csrc.cuda import toolkit
from tests.cuda.emulated import Emulator
from tests.cuda.library_build import Library, built, missing

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"


def pytest_collection_modifyitems(items):
    """What takes minutes comes last: the whole library, and what Inductor compiles.

    What ends one of the latter that takes too long ends all that would come after it.
    """

    def minutes(item):
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        needed = "library" in getattr(item, "fixturenames", ())
        return needed, parameters.get("backend") == "inductor"

    items.sort(key=minutes)


@pytest.fixture(scope="session")
def library() -> Library:
    """Built for the tests; skips without the tools."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    return built()


@pytest.fixture
def seed() -> int:
    """Another one in every run; a failure prints it."""
    value = random.SystemRandom().randrange(2**31)
    torch.manual_seed(value)
    print(f"seed {value}")
    return value


def header_directories() -> list[Path]:
    """Include directories of the CUDA runtime: the toolkit's, else those of NVIDIA's wheels."""
    found = toolkit.home()
    includes = [found / "include"] if found else []
    spec = importlib.util.find_spec("nvidia")
    for root in (spec.submodule_search_locations or []) if spec else []:
        includes += sorted(Path(root).glob("*/include"))
    for include in includes:
        if (include / "cuda_fp16.h").exists() and (include / "cuda_runtime_api.h").exists():
            return [path for path in (include, include / "cccl") if path.exists()]
    return []


@pytest.fixture(scope="session")
def compile_for_host(tmp_path_factory):
    """Compiles a file of this directory with g++ to a shared library; skips without the tools."""
    directory = tmp_path_factory.mktemp("cuda")

    def compile_library(source: str, *flags: str) -> ctypes.CDLL:
        compiler = os.environ.get("CXX") or shutil.which("g++")
        if compiler is None:
            pytest.skip("needs a C++ compiler: install g++")
        headers = header_directories()
        if not headers:
            pytest.skip(
                "needs the CUDA headers: a CUDA toolkit, or the packages nvidia-cuda-runtime, "
                "nvidia-cuda-crt and nvidia-cuda-cccl"
            )
        library = directory / Path(source).with_suffix(".so").name
        command = [
            compiler, "-std=c++20", "-shared", "-fPIC", "-fno-strict-aliasing", "-pthread",
            *flags, f"-I{SOURCES}", f"-I{HERE}",
            *(flag for path in headers for flag in ("-isystem", str(path))),
            str(HERE / source), "-o", str(library),
        ]  # fmt: skip
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-4000:]
        return ctypes.CDLL(str(library))

    return compile_library


@pytest.fixture(scope="session")
def emulator(compile_for_host):
    """The kernels on the emulator."""
    return Emulator(compile_for_host("emulated_kernels.cpp", "-O1", "-Wall"))


@pytest.fixture(scope="session")
def compile_with_cutlass(compile_for_host):
    """The same for files that include CUTLASS."""

    def compile_library(source: str, *flags: str) -> ctypes.CDLL:
        cutlass = toolkit.cutlass()
        if cutlass is None:
            pytest.skip(toolkit.cutlass_missing())
        includes = ("-isystem", str(cutlass / "include"))
        return compile_for_host(source, "-w", "-fpermissive", *includes, *flags)

    return compile_library
