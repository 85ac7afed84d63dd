"""How many parallel regions a call has: threads are started and waited for in each of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from tests.kernels.preloaded import COMPILER, preloaded

THREADS = 2
N, K = 264, 128  # more row groups than threads, for every instruction set
TOKENS = (1, 2, 4, 5, 6, 7, 12, 13, 16, 17, 28, 29, 32, 33, 48, 60, 64, 65,
          256, 257, 268, 269, 288, 512, 513, 530, 1025)  # fmt: skip
LAYERS = ("bfloat16", "int8", "gathered")
EXPERTS = "experts"
EXPERT_TOKENS = (1, 40, 2048, 2049)
EXPERT_REGIONS = [1, 1, 1, 2]
"""One for every 2048 tokens."""

pytestmark = [
    pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built"),
    pytest.mark.skipif(not COMPILER, reason="no C compiler is installed"),
]


def count(isa: str, regions: Callable[[], int]) -> dict[str, list[int]]:
    """For every kind of layer, the regions of a call with each number of tokens.

    `regions` gives how many there were so far.
    """
    plain = random_layer(N, K, permuted=False)
    layers = (plain, to_int8(plain), random_layer(N, K, block_size=128))
    found = {}
    for name, layer in zip(LAYERS, layers, strict=True):
        packed = CpuBackend(isa).pack(layer.weights)
        found[name] = []
        for m in TOKENS:
            x = torch.randn(m, K).bfloat16()
            before = regions()
            ops.sparse_linear(
                x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, N, "2:4"
            )
            found[name].append(regions() - before)
    found[EXPERTS] = count_of_experts(isa, regions)
    return found


def count_of_experts(isa: str, regions: Callable[[], int]) -> list[int]:
    """The regions of a call of two experts with each number of tokens."""
    backend = CpuBackend(isa)
    operands: list[torch.Tensor | None] = []
    for n, k in ((2 * K, K), (K, K)):
        stack = backend.stack([backend.pack(random_layer(n, k, seed=e).weights) for e in range(2)])
        operands += [stack.packed, stack.metadata, stack.permutation, stack.scale]
    found = []
    for m in EXPERT_TOKENS:
        ids = torch.arange(2, dtype=torch.int32).expand(m, 2).contiguous()
        x, weights = torch.randn(m, K).bfloat16(), torch.rand(m, 2)
        before = regions()
        torch.ops.permllm.sparse_experts(x, weights, ids, *operands, K)
        found.append(regions() - before)
    return found


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, list[int]]]:
    """Of a process that preloads the counter, by instruction set."""
    code = (
        "import ctypes, json, torch\n"
        "from permllm_vllm.backends.cpu import instruction_sets\n"
        "from tests.kernels.test_regions import THREADS, count\n"
        "torch.set_num_threads(THREADS)\n"
        "regions = ctypes.CDLL(None).count_regions\n"
        "regions.restype = ctypes.c_long\n"
        "torch.randn(1000, 1000) + 1\n"
        "found = {'torch': regions()}\n"
        "for isa in instruction_sets():\n"
        "    found[isa] = count(isa, regions)\n"
        "print(json.dumps(found))"
    )
    found = preloaded(
        Path(__file__).with_name("regions.c"), tmp_path_factory.mktemp("counter"), code
    )
    if found.pop("torch") == 0:
        pytest.skip("torch has another OpenMP runtime than GCC's, and its regions are not seen")
    return found


def test_a_call_has_one_region(counts, isa: str) -> None:
    one = {name: [1] * len(TOKENS) for name in LAYERS}
    assert counts[isa] == one | {EXPERTS: EXPERT_REGIONS}
