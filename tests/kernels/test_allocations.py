"""In the steady state a call allocates its result and the handles of its tensors, no more."""

import ctypes
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from tests.kernels.preloaded import COMPILER, preloaded
from tests.kernels.test_head import WITH_KERNELS

CALLS = {1: 100, 2: 10}  # of every kind, 33 kinds at most, by threads
ROUNDS = 3
"""Of calls; the round with the fewest requests is the steady state. A thread that other work kept
from a kernel at first grows its buffers in a later round, once."""
INTERMEDIATE = 64
N, K = 264, 256  # a result has 528 bytes and more: allocations.c counts it as large
TOKENS = (1, 2, 7, 16, 17, 40, 300)  # every kernel, a remainder, more than are packed at once
TORCH = "2.13"
HANDLES = {"linear": 20, "experts": 24, "head": 14}
"""Requests of a call with this PyTorch, by operator: its result, and handles of its tensors."""
OPTIONAL = 3
"""More of them for each optional tensor: a permutation, a scale."""

pytestmark = [
    pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built"),
    pytest.mark.skipif(not COMPILER, reason="no C compiler is installed"),
    pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator is counted"),
]


Call = Callable[[Tensor], Tensor]
Kind = tuple[str, int, Sequence[int], Call]
"""The operator and what it is given, its optional tensors, tokens."""
Counts = dict[str, list[tuple[str, int, int, int, int]]]


def requests(call: Call, x: Tensor, calls: int) -> tuple[int, int]:
    """Of a call in the steady state: requests of 512 bytes and more, and all."""
    library = ctypes.CDLL(None)
    for _ in range(3):
        call(x)
    rounds = []
    for _ in range(ROUNDS):
        before = library.count_large(), library.count_all()
        for _ in range(calls):
            call(x)
        after = library.count_large(), library.count_all()
        rounds.append((after[0] - before[0], after[1] - before[1]))
    return min(rounds)


def given(*tensors: Tensor | None) -> int:
    return sum(tensor is not None for tensor in tensors)


def linears(isa: str) -> Iterator[Kind]:
    """Sparse layers."""
    for block_size in (64, 128):  # the inputs of blocks of 128 are gathered
        layer = random_layer(N, K, block_size=block_size)
        for values in (layer, to_int8(layer)):
            packed = CpuBackend(isa).pack(values.weights)
            operands = packed.packed, packed.metadata, packed.permutation, packed.scale, None
            optional = given(packed.permutation, packed.scale)
            kind = f"linear of {values.weights.values.dtype}, blocks of {block_size}"
            yield (
                kind,
                optional,
                TOKENS,
                lambda x, own=operands: ops.sparse_linear(x, *own, N, "2:4"),
            )


def experts(isa: str) -> Iterator[Kind]:
    """Two experts, both of which every token has."""
    backend = CpuBackend(isa)
    gate_up, down = (
        backend.stack([backend.pack(random_layer(n, k, seed=e).weights) for e in range(2)])
        for n, k in ((2 * INTERMEDIATE, K), (K, INTERMEDIATE))
    )
    operands = [
        operand
        for one in (gate_up, down)
        for operand in (one.packed, one.metadata, one.permutation, one.scale)
    ]
    routed = {
        m: (torch.ones(m, 2), torch.tensor([[0, 1]] * m, dtype=torch.int32)) for m in TOKENS[:3]
    }
    yield (
        "experts",
        given(gate_up.permutation, gate_up.scale, down.permutation, down.scale),
        tuple(routed),
        lambda x: torch.ops.permllm.sparse_experts(x, *routed[len(x)], *operands, INTERMEDIATE),
    )


def heads(isa: str) -> Iterator[Kind]:
    """The dense output head, where this instruction set has a kernel for it."""
    os.environ["PERMLLM_CPU_ISA"] = isa
    if torch.ops.permllm.cpu_head_tokens(N, K):
        weight = torch.ops.permllm.cpu_huge_bytes(2 * N * K).view(torch.bfloat16).view(N, K)
        weight.copy_(torch.randn(N, K))
        yield "head", 0, TOKENS[:2], lambda x: torch.ops.permllm.head_linear(x, weight)


def count(isa: str, calls: int) -> list[tuple[str, int, int, int, int]]:
    """For all kinds of calls: what it is, its optional tensors, tokens, and `requests`."""
    return [
        (kind, optional, m, *requests(call, torch.randn(m, K).bfloat16(), calls))
        for kinds in (linears, experts, heads)
        for kind, optional, tokens, call in kinds(isa)
        for m in tokens
    ]


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Counts:
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
def test_a_call_allocates_its_result_alone(counts: Counts, isa: str, threads: int) -> None:
    handles: dict[str, int] = {}
    for kind, _, m, large, every in counts[f"{isa} {threads}"]:
        assert large == CALLS[threads], f"{kind}, {m} tokens"
        # PyTorch makes handles of what goes in and out: as many, whatever the number of tokens.
        assert every == handles.setdefault(kind, every), f"{kind}, {m} tokens"


@pytest.mark.parametrize("threads", list(CALLS))
def test_a_call_makes_the_handles_of_its_tensors_alone(
    counts: Counts, isa: str, threads: int
) -> None:
    if not torch.__version__.startswith(f"{TORCH}."):
        pytest.skip(f"how many PyTorch makes was counted with {TORCH}")
    for kind, optional, m, _, every in counts[f"{isa} {threads}"]:
        expected = HANDLES[kind.split()[0]] + OPTIONAL * optional
        assert every == expected * CALLS[threads], f"{kind}, {m} tokens"


def test_the_head_finds_its_kernel_without_memory(counts: Counts) -> None:
    """Each instruction set stands at another place among those that are looked through."""
    handles = {
        isa: {every for kind, *_, every in counts[f"{isa} 1"] if kind == "head"}
        for isa in instruction_sets()
        if isa in WITH_KERNELS
    }
    if not handles:
        pytest.skip("this CPU has no kernel for a dense head")
    assert all(len(found) == 1 for found in handles.values())
    assert len(set.union(*handles.values())) == 1
