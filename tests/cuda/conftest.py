"""Builds the host programs of this directory, once per session."""

import ctypes
import importlib.util
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from csrc.cuda import architectures, toolkit
from tests.cuda.emulated import Emulator
from tests.cuda.library_build import LIBRARY_BUILD, Library, LibraryBuild, OptionalKernels, missing

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc" / "cuda"


BUILT = ("library", "optional_kernels")
"""Fixtures that wait for the build; the second needs the first."""


def fixtures_of(item):
    return getattr(item, "fixturenames", ())


def compiles(item):
    """Whether Inductor compiles in it, which takes a minute where nothing is cached."""
    return getattr(item, "callspec", None) and item.callspec.params.get("backend") == "inductor"


def pytest_collection_modifyitems(items):
    """What takes minutes comes last: the whole library has to be built, then what follows it.

    Inductor's too: what ends one that takes too long ends all that would come after it.
    """
    items.sort(
        key=lambda item: (sum(name in fixtures_of(item) for name in BUILT), bool(compiles(item)))
    )


def pytest_collection_finish(session):
    """Begin to build it, if any test needs it."""
    needed = {name for item in session.items for name in fixtures_of(item) if name in BUILT}
    if needed and not session.config.option.collectonly and not missing():
        optional = "optional_kernels" in needed and bool(architectures.chosen())
        session.config.stash[LIBRARY_BUILD] = LibraryBuild(optional=optional)


def pytest_unconfigure(config):
    """End a build that no test has waited for."""
    if LIBRARY_BUILD in config.stash:
        config.stash[LIBRARY_BUILD].stop()


@pytest.fixture(scope="session")
def library(request) -> Library:
    """The one that was begun when the tests were; skips without the tools."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    return request.config.stash[LIBRARY_BUILD].library(
        reporter.write_line if reporter else lambda line: None
    )


@pytest.fixture(scope="session")
def optional_kernels(request, library) -> OptionalKernels:
    """Compiled after the library; skips where no architectures are chosen: it takes minutes."""
    if not architectures.chosen():
        pytest.skip("they take minutes: name architectures in PERMLLM_CUDA_ARCHS")
    return request.config.stash[LIBRARY_BUILD].optional_kernels()


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
        directories = (cutlass / "include", cutlass / "tools" / "util" / "include")
        includes = [flag for path in directories for flag in ("-isystem", str(path))]
        return compile_for_host(source, "-w", "-fpermissive", *includes, *flags)

    return compile_library
