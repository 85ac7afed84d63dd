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


INVALID_CONFIGURATION, NO_MEMORY, ILLEGAL_ADDRESS = 9, 2, 700


@pytest.fixture(scope="module")
def runtime(compile_for_host):
    return compile_for_host("launch_errors.cpp", "-O1", "-Wall", "-Wl,-Bsymbolic")


@pytest.mark.parametrize("shared_bytes", [0, 64 << 10])  # more has to be allowed first
def test_a_launch_that_fails_leaves_no_error_behind(runtime, shared_bytes):
    """CUTLASS would take it for one of the next product."""
    runtime.begin(0, 0, NO_MEMORY)
    assert runtime.launch_ours(shared_bytes) == NO_MEMORY
    assert runtime.left() == 0
    assert runtime.launch_cutlass() == 0
    assert runtime.launch_ours(shared_bytes) == 0


def test_an_error_of_another_call_is_none_of_cutlass(runtime):
    runtime.begin(NO_MEMORY, 0, 0)
    assert runtime.launch_cutlass() == 0


def test_a_launch_of_cutlass_that_is_not_accepted(runtime):
    runtime.begin(0, 0, NO_MEMORY)  # which it does not tell
    assert runtime.launch_cutlass() == INVALID_CONFIGURATION
    assert runtime.launch_cutlass() == 0


def test_a_thread_without_a_context_is_given_one_before_cutlass_encodes(runtime):
    runtime.begin(0, 0, 0)
    before = runtime.launched()
    assert runtime.launch_cutlass() == 0
    assert runtime.launched() == before + 1
    runtime.refuse_to_bind(NO_MEMORY)
    assert runtime.launch_cutlass() == NO_MEMORY
    assert runtime.launched() == before + 1
    assert runtime.left() == 0


def test_descriptors_are_encoded_where_the_context_is_bound():
    code = (SOURCES / "many_tokens_cutlass.h").read_text()
    assert code.index("launch_by_cutlass(") < code.index("to_underlying_arguments(")


@pytest.mark.parametrize(
    ("capability", "driver", "allowed", "overlaps"),
    [
        (90, 12030, 1, 1),
        (100, 13000, 1, 1),
        (90, 13000, 0, 0),  # PERMLLM_CUDA_PDL=0
        (90, 12020, 1, 0),  # graphs of this driver have no such edges
        (89, 13000, 1, 0),
    ],
)
def test_where_kernels_overlap(runtime, capability, driver, allowed, overlaps):
    runtime.begin(0, 0, 0)
    assert runtime.describe(capability, driver, allowed) == overlaps
    assert runtime.launch_ours(0) == 0
    assert runtime.launched_to_overlap() == overlaps


def test_errors_of_a_driver_that_is_too_old(runtime):
    insufficient_driver, newer_call, ptx = 35, 36, 222
    old = [error for error in range(1000) if runtime.is_newer_than_driver(error)]
    assert old == [insufficient_driver, newer_call, ptx]


def test_cutlass_overlaps_where_the_others_do():
    code = (SOURCES / "many_tokens_cutlass.h").read_text()
    assert "/*launch_with_pdl=*/device.overlaps" in code


def test_an_error_of_a_kernel_is_told_by_every_launch(runtime):
    runtime.begin(ILLEGAL_ADDRESS, 1, 0)
    for _ in range(2):
        assert runtime.launch_cutlass() == ILLEGAL_ADDRESS
        assert runtime.launch_ours(0) == ILLEGAL_ADDRESS


def test_the_largest_sizes_fit_a_launch(emulator):
    grids = emulator.largest_grids()
    assert max(grids) == 65535
    assert min(grids) >= 1


def test_attributes_of_kernels_are_set_nowhere_else():
    """Nor by CUTLASS' adapter: its `initialize` and its `run` of arguments would, every time."""
    calls = []
    for path in sorted(SOURCES.iterdir()):
        if path.suffix in {".cu", ".h", ".cpp"}:
            code = re.sub(r"//.*", "", path.read_text())
            calls += [path.name] * code.count("cudaFuncSetAttribute")
            assert not re.search(r"\.initialize\(|\.run\(", code), path.name
    assert calls == ["launch.h"]
