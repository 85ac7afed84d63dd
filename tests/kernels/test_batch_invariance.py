"""A token's bits depend on the kernel that multiplies it, and the kernel on the batch alone."""

import itertools
from dataclasses import replace

import pytest
import torch

from benchmarks.shapes import Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import SIXTEEN_BITS_ONLY
from tests.kernels.test_cpu import run

# The table of docs/cpu.md: the most tokens of each kernel but the last, which takes any number.
KERNELS = {
    "amx": {"few": 16, "two tiles": 32},
    "amx int8": {"split": 16},
    "avx512": {"few": 12},
    "avx2": {"few": 6},
    "portable": {"few": 4},
}
AVX512 = {
    "avx512_bf16": {"few": 6, "several": 16},
    "avx512_bf16 int8": {"split": 2, "few": 6, "several": 16},
    "zen5": {"few": 5, "several": 16},
    "zen5 int8": {"split": 2, "few": 5, "several": 16},
}
GATHERED = 256  # tokens at a time, where packing does not undo the permutation
# So many tokens, the first of them being the one in question, take the kernel of this name.
ALONE = {"split": 1, "few": 3, "several": 7, "two tiles": 17, "many": 48}
# What adds the same numbers in the same order with bfloat16 values.
SAME_ORDER = ({"two tiles", "many"},)
TOKENS = (*range(1, 34), 38, 39, 44, 45, 48, 64, 257, 258)
N, K = 200, 1088


def kernel(most: dict[str, int], m: int) -> str:
    return next((name for name, tokens in most.items() if m <= tokens), "many")


def kernels(isa: str, int8: bool, m: int) -> list[str]:
    """The kernel of each of m tokens of a permuted layer, whose blocks have 64 inputs."""
    if isa not in SIXTEEN_BITS_ONLY and m > GATHERED:
        return kernels(isa, int8, GATHERED) + kernels(isa, int8, m - GATHERED)
    name = f"{isa} int8" if int8 and isa in SIXTEEN_BITS_ONLY else isa
    if name in KERNELS:
        return [kernel(KERNELS[name], m)] * m
    most = AVX512[name]
    rest = m % 16
    if m <= 16 or rest == 0 or rest > 12:
        return [kernel(most, m)] * m
    return [kernel(most, m - rest)] * (m - rest) + [kernel(most, rest)] * rest


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def layer(request: pytest.FixtureRequest) -> Layer:
    drawn = random_layer(N, K)
    return to_int8(drawn) if request.param == "int8" else drawn


def test_a_token_does_not_depend_on_the_others(layer: Layer, isa: str) -> None:
    int8 = layer.weights.scale is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(TOKENS) + max(ALONE.values()), K, generator=generator).bfloat16()
    for m in TOKENS:
        y = run(layer, isa, x[:m])
        names = kernels(isa, int8, m)
        for token in {0, m // 2, m - m % 16 - 1, m - m % 16, m - 1} & set(range(m)):
            alone = run(layer, isa, x[token : token + ALONE[names[token]]])
            assert torch.equal(y[token], alone[0]), f"token {token} of {m}: {names[token]}"


def test_results_change_with_the_kernel_and_nowhere_else(layer: Layer, isa: str) -> None:
    """Every token is the same, and the bias takes all off but what bfloat16 has no bits for."""
    int8 = layer.weights.scale is not None
    x = torch.randn(1, K, generator=torch.Generator().manual_seed(0)).bfloat16()
    rest = replace(layer, bias=-run(layer, isa, x)[0])
    result = {
        name: run(rest, isa, x.expand(ALONE[name], K))[0]
        for name in dict.fromkeys(name for m in TOKENS for name in kernels(isa, int8, m))
    }
    for m in TOKENS:
        y = run(rest, isa, x.expand(m, K))
        for token, name in enumerate(kernels(isa, int8, m)):
            assert torch.equal(y[token], result[name]), f"token {token} of {m}: {name}"
    for one, other in itertools.combinations(result, 2):
        # Sums of 8-bit activations are exact integers, whatever the kernel.
        exact = int8 and isa in SIXTEEN_BITS_ONLY and "split" not in (one, other)
        same = exact or {one, other} in SAME_ORDER
        assert torch.equal(result[one], result[other]) == same, f"{one} and {other}"
