"""Without memory an operator raises MemoryError that says how much was asked for, on any thread."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.preloaded import COMPILER, preloaded

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
N, K, TOKENS = 264, 128, 40  # so many that a thread asks for a panel of its own


@pytest.mark.parametrize("exponent", [47, 62])
def test_more_than_there_are_addresses(exponent: int) -> None:
    message = rf"no {2**exponent} bytes for .*\(ulimit -v.* take a smaller model"
    with pytest.raises(MemoryError, match=message):
        torch.ops.permllm.cpu_huge_bytes(2**exponent)


def multiply_without_memory() -> tuple[str, bool]:
    """What a call on two threads raises while the second has no memory; if the next one is right.

    The first call of a process: no thread has buffers yet.
    """
    library = ctypes.CDLL(None)
    torch.set_num_threads(2)
    packed = CpuBackend("portable").pack(random_layer(N, K, permuted=False).weights)
    operands = packed.packed, packed.metadata, packed.permutation, packed.scale, None
    x = torch.randn(TOKENS, K).bfloat16()
    found = ""
    library.refuse(1)
    try:
        ops.sparse_linear(x, *operands, N, "2:4")
    except MemoryError as error:
        found = str(error)
    library.refuse(0)
    again = ops.sparse_linear(x, *operands, N, "2:4")
    torch.set_num_threads(1)
    return found, torch.equal(again, ops.sparse_linear(x, *operands, N, "2:4"))


@pytest.mark.skipif(not COMPILER, reason="no C compiler is installed")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is replaced")
def test_a_thread_without_memory(tmp_path: Path) -> None:
    code = (
        "import json\n"
        "from tests.kernels.test_out_of_memory import multiply_without_memory\n"
        "print(json.dumps(multiply_without_memory()))"
    )
    found, right = preloaded(Path(__file__).with_name("no_memory.c"), tmp_path, code)
    assert "the system has no " in found
    assert right
