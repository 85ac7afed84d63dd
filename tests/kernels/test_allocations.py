"""In the steady state a call allocates its result and the handles of its tensors, no more."""

import ctypes
import platform
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.preloaded import COMPILER, preloaded

CALLS = {1: 100, 2: 10}  # of every kind, 28 kinds, by threads
ROUNDS = 3
"""Of calls; the round with the fewest requests is the steady state. A thread that other work kept
from a kernel at first grows its buffers in a later round, once."""
N, K = 264, 128  # a result has 528 bytes and more: allocations.c counts it as large
TOKENS = (1, 2, 7, 16, 17, 40, 300)  # every kernel, a remainder, more than are packed at once

pytestmark = [
    pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built"),
    pytest.mark.skipif(not COMPILER, reason="no C compiler is installed"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is counted"),
]


def count(isa: str, calls: int) -> list[tuple[str, int, int, int]]:
    """For all kinds of calls: what it is, tokens, requests of 512 bytes and more, and all."""
    library = ctypes.CDLL(None)
    found = []
    for block_size in (64, 128):  # the inputs of blocks of 128 are gathered
        layer = random_layer(N, K, block_size=block_size)
        for values in (layer, to_int8(layer)):
            packed = CpuBackend(isa).pack(values.weights)
            for m in TOKENS:
                x = torch.randn(m, K).bfloat16()
                arguments = (
                    x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, N,
                    "2:4",
                )  # fmt: skip
                for _ in range(3):
                    ops.sparse_linear(*arguments)
                rounds = []
                for _ in range(ROUNDS):
                    before = library.count_large(), library.count_all()
                    for _ in range(calls):
                        ops.sparse_linear(*arguments)
                    after = library.count_large(), library.count_all()
                    rounds.append((after[0] - before[0], after[1] - before[1]))
                kind = f"{values.weights.values.dtype}, blocks of {block_size}"
                found.append((kind, m, *min(rounds)))
    return found


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[tuple[str, int, int, int]]]:
    """Of a process that preloads the counter, by instruction set and threads."""
    code = (
        "import json, torch\n"
        "from permllm_vllm.backends.cpu import instruction_sets\n"
        "from tests.kernels.test_allocations import CALLS, count\n"
        "found = {}\n"
        "for threads, calls in CALLS.items():\n"
        "    torch.set_num_threads(threads)\n"
        "    for isa in instruction_sets():\n"
        "        found[f'{isa} {threads}'] = count(isa, calls)\n"
        "print(json.dumps(found))"
    )
    return preloaded(
        Path(__file__).with_name("allocations.c"), tmp_path_factory.mktemp("counter"), code
    )


@pytest.mark.parametrize("threads", list(CALLS))
def test_a_call_allocates_its_result_alone(counts, isa: str, threads: int) -> None:
    handles: dict[str, int] = {}
    for kind, m, large, every in counts[f"{isa} {threads}"]:
        assert large == CALLS[threads], f"{kind}, {m} tokens"
        # PyTorch makes handles of what goes in and out: as many, whatever the number of tokens.
        assert every == handles.setdefault(kind, every), f"{kind}, {m} tokens"
        assert every % CALLS[threads] == 0
