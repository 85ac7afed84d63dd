"""A token's bits depend on the kernel that multiplies it, and the kernel on the batch alone."""

import itertools
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.shapes import Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import SIXTEEN_BITS_ONLY
from tests.kernels.cases import GROUPS, TWELVE_BITS
from tests.kernels.test_activations import EXACT_TOKENS
from tests.kernels.test_cpu import run
from tests.kernels.test_int8 import INTEGERS
from tests.kernels.test_twelve_bits import layer_of

# The table of docs/cpu.md: the most tokens of each kernel but the last, which takes any number.
KERNELS = {
    "amx": {"few": 16, "two tiles": 32},
    "amx int8": {"split": 16},
    "avx512": {"few": 8},
    "avx512_bf16": {"up to 48": 48},
    "avx512_bf16 int8": {"split": 2},
    "zen5": {"up to 48": 48},
    "zen5 int8": {"split": 2},
    "avx512_vnni int8": {"split": 2, "few": 7},
    "avx2": {"one": 1, "few": 3},
    "avx2 int8": {"split": 2},
    "avx2_vnni int8": {"split": 2},
    "portable": {"few": 4},
}
# Where rows are expanded; bfloat16 values that are not in 12 bits are.
AVX512 = {
    "avx512_bf16 expanded": {"few": 6, "several": 16},
    "zen5 expanded": {"few": 10, "several": 16},
    "avx512_vbmi2 int8": {"split": 2, "few": 6, "several": 16},
}
# Whose kernels multiply bfloat16 values, where an instruction set has none of its own.
OF_BFLOAT16 = {"avx512_vbmi2": "avx512", "avx512_vnni": "avx512", "avx2_vnni": "avx2"}
GATHERED = 256  # tokens at a time, where packing does not undo the permutation
PARTS = "parts, "
STRAYS = "bfloat16 with strays"
# A number of tokens for which each kernel is chosen.
ALONE = {
    "split": 1,
    "one": 1,
    "few": 3,
    "up to 48": 3,
    "several": 11,
    "two tiles": 17,
    "many": 97,
}
# What adds the same numbers in the same order with bfloat16 values.
SAME_ORDER = ({"two tiles", "many"}, {"up to 48", "many"})
TOKENS = (*range(1, 34), 38, 39, 44, 45, 48, 49, 64, 96, 97, 128, 129, 257, 258)
N, K = 200, 1088


def kernel(most: dict[str, int], m: int) -> str:
    return next((name for name, tokens in most.items() if m <= tokens), "many")


def kernels(isa: str, int8: bool, m: int, half: bool = False, strays: bool = False) -> list[str]:
    """The kernel of each of m tokens of a permuted layer, whose blocks have 64 inputs.

    `half`: float16 that meets bfloat16 values, of which few are two rows each. `strays`: of these
    values, too many for 12 bits.
    """
    if not int8:
        isa = OF_BFLOAT16.get(isa, isa)
    if half and m <= EXACT_TOKENS.get(isa, 0):
        return [PARTS + name for name in kernels(isa, int8, 2 * m, strays=strays)[::2]]
    if isa not in SIXTEEN_BITS_ONLY and m > GATHERED:
        return kernels(isa, int8, GATHERED) + kernels(isa, int8, m - GATHERED)
    name = f"{isa} int8" if int8 and isa in INTEGERS else isa
    if strays and isa in GROUPS:
        name = f"{isa} expanded"
    if name in KERNELS:
        return [kernel(KERNELS[name], m)] * m
    most = AVX512[name]
    rest = m % 16
    if m <= 16 or rest == 0 or rest > 12:
        return [kernel(most, m)] * m
    return [kernel(most, m - rest)] * (m - rest) + [kernel(most, rest)] * rest


def alone(name: str) -> int:
    """So many tokens, the first of them being the one in question, take the kernel of this name."""
    count = ALONE[name.removeprefix(PARTS)]
    return -(-count // 2) if name.startswith(PARTS) else count


@dataclass(frozen=True)
class Subject:
    """A layer, the dtype of its activations, and whether 12 bits do not hold its values."""

    layer: Layer
    dtype: torch.dtype
    strays: bool

    @property
    def int8(self) -> bool:
        return self.layer.weights.scale is not None

    @property
    def half(self) -> bool:
        """Whether float16 meets bfloat16 values."""
        return self.dtype == torch.float16 and not self.int8

    def kernels(self, isa: str, m: int) -> list[str]:
        """Of each of so many tokens."""
        return kernels(isa, self.int8, m, self.half, self.strays)


@pytest.fixture(
    scope="module",
    params=itertools.product(["bfloat16", STRAYS, "int8"], [torch.bfloat16, torch.float16]),
    ids=lambda pair: f"{pair[0]} values, {pair[1]}",
)
def subject(request: pytest.FixtureRequest) -> Subject:
    values, dtype = request.param
    drawn = random_layer(N, K)
    if values == STRAYS:
        small = drawn.weights.values.clone()
        small[:, ::8] *= 2.0**-30
        drawn = layer_of(small)
    return Subject(to_int8(drawn) if values == "int8" else drawn, dtype, values == STRAYS)


@pytest.fixture(autouse=True)
def _strays_where_12_bits_are(subject: Subject, isa: str) -> None:
    if subject.strays and isa not in TWELVE_BITS:
        pytest.skip(f"{isa} stores no bfloat16 values in 12 bits")


def test_a_token_does_not_depend_on_the_others(subject: Subject, isa: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(TOKENS) + max(ALONE.values()), K, generator=generator).to(subject.dtype)
    for m in TOKENS:
        y = run(subject.layer, isa, x[:m])
        names = subject.kernels(isa, m)
        for token in {0, m // 2, m - m % 16 - 1, m - m % 16, m - 1} & set(range(m)):
            apart = run(subject.layer, isa, x[token : token + alone(names[token])])
            assert torch.equal(y[token], apart[0]), f"token {token} of {m}: {names[token]}"


def test_results_change_with_the_kernel_and_nowhere_else(subject: Subject, isa: str) -> None:
    """Every token is the same, and the bias takes all off but what 16 bits have no place for."""
    x = torch.randn(1, K, generator=torch.Generator().manual_seed(0)).to(subject.dtype)
    rest = replace(subject.layer, bias=-run(subject.layer, isa, x)[0])
    result = {
        name: run(rest, isa, x.expand(alone(name), K))[0]
        for name in dict.fromkeys(name for m in TOKENS for name in subject.kernels(isa, m))
    }
    for m in TOKENS:
        y = run(rest, isa, x.expand(m, K))
        for token, name in enumerate(subject.kernels(isa, m)):
            assert torch.equal(y[token], result[name]), f"token {token} of {m}: {name}"
    for one, other in itertools.combinations(result, 2):
        # Sums of 8-bit activations are exact integers, whatever the kernel.
        exact = subject.int8 and isa in INTEGERS and "split" not in (one, other)
        same = exact or {one, other} in SAME_ORDER
        assert torch.equal(result[one], result[other]) == same, f"{one} and {other}"
