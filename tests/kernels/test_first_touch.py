"""A thread multiplies the row groups of a packed weight that it touched first, by packing them.

Pages are closed, and a handler of the fault notes who opens each: first while a weight is packed,
then in a call. AMX has tests/kernels/amx/test_first_touch.py.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.cases import TWELVE_BITS
from tests.kernels.preloaded import COMPILER, preloaded

THREADS = (1, 2, 3)
TOKENS = (1, 3, 6, 7, 16, 48, 128)  # every kernel; one part, in which no thread helps another
ROWS = {"bfloat16": 512, "int8": 1024}
GROUP_ROWS, K, PAGE = 8, 4096, 4096
GROUP_PAGES = {"bfloat16": 9, "int8": 5}
TWELVE_BITS_PAGES = 7
"""Whole pages, with so many inputs."""

pytestmark = [
    pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built"),
    pytest.mark.skipif(not COMPILER, reason="no C compiler is installed"),
]


def touched(isa: str, values: str) -> dict[str, list[list[int]]]:
    """The threads that first touch each page of each eight rows: in packing, and in a call.

    Without the first pages, which the row group before may read a bit of.
    """
    library = ctypes.CDLL(None)
    library.watch_pages.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    library.threads.argtypes = [ctypes.c_void_p]
    library.threads.restype = ctypes.POINTER(ctypes.c_int)
    n, pages = ROWS[values], GROUP_PAGES[values]
    if values == "bfloat16" and isa in TWELVE_BITS:
        pages = TWELVE_BITS_PAGES
    groups = n // GROUP_ROWS
    layer = random_layer(n, K, permuted=False)
    weights = layer.weights if values == "bfloat16" else to_int8(layer).weights
    backend = CpuBackend(isa)
    library.watch_mapping()
    packed = backend.pack(weights)
    begin = packed.packed.data_ptr()

    def of_groups() -> list[list[int]]:
        whose = library.threads(begin)
        return [whose[group * pages + 1 : (group + 1) * pages] for group in range(groups)]

    found = {"packing": of_groups()}
    for m in TOKENS:
        x = torch.randn(m, K).bfloat16()
        library.watch_pages(begin, groups * pages * PAGE)
        ops.sparse_linear(x, packed.packed, packed.metadata, None, packed.scale, None, n, "2:4")
        found[str(m)] = of_groups()
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[list[int]]]]:
    """By threads, instruction set and dtype of the values."""
    code = (
        "import json, torch\n"
        "from permllm_vllm.backends.cpu import instruction_sets\n"
        "from tests.kernels.test_first_touch import ROWS, THREADS, touched\n"
        "found = {}\n"
        "for threads in THREADS:\n"
        "    torch.set_num_threads(threads)\n"
        "    for isa in instruction_sets():\n"
        "        if isa != 'amx':\n"
        "            for values in ROWS:\n"
        "                found[f'{threads} {isa} {values}'] = touched(isa, values)\n"
        "print(json.dumps(found))"
    )
    source = Path(__file__).with_name("first_touch.c")
    return preloaded(source, tmp_path_factory.mktemp("first_touch"), code)


@pytest.mark.parametrize("values", list(ROWS))
@pytest.mark.parametrize("threads", THREADS)
def test_a_thread_reads_what_it_packed(found, isa: str, threads: int, values: str) -> None:
    if isa == "amx":
        pytest.skip("its threads help each other: tests/kernels/amx/test_first_touch.py")
    by = found[f"{threads} {isa} {values}"]
    packing = by.pop("packing")
    assert all(len(set(group)) == 1 for group in packing)
    assert len({group[0] for group in packing} - {0}) == threads
    for m, call in by.items():
        assert call == packing, f"{m} tokens"
