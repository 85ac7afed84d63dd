"""What a launch does once, and what it leaves out afterwards."""

import ctypes
import re

import pytest

from tests.cuda.conftest import SOURCES


@pytest.fixture(scope="module")
def once(compile_for_host):
    library = compile_for_host("once_per_kernel.cpp", "-O1", "-Wall")

    def run(*numbers: int) -> tuple[int, int]:
        ran = ctypes.c_int()
        return library.run_once_per_kernel(*numbers, ctypes.byref(ran)), ran.value

    return run


@pytest.mark.parametrize("failures", [0, 3])
def test_once_per_kernel_and_gpu_in_any_number_of_threads(once, failures):
    errors, ran = once(8, 3, 2, 200, failures)
    assert errors == failures  # the next call tries again
    assert ran == failures + 3 * 2


def test_attributes_of_kernels_are_set_nowhere_else():
    """Nor by CUTLASS' adapter: its `initialize` and its `run` of arguments would, every time."""
    calls = []
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cu", ".h", ".cpp"}:
            code = re.sub(r"//.*", "", path.read_text())
            calls += [path.name] * code.count("cudaFuncSetAttribute")
            assert not re.search(r"\.initialize\(|\.run\(", code), path.name
    assert calls == ["launch.h"]
