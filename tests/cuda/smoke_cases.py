"""One small product by every kernel and tile, and a permutation, against float64."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.shapes import random_layer
from tests.cuda.experts_on_gpu import Experts, routed
from tests.cuda.layers import int8_layer
from tests.cuda.on_gpu import CUDA, OnGpu

NEEDS = {"many_tokens_sm90": (9, 0), "many_tokens_sm90_permuting": (9, 0),
         "many_tokens_sm100": (10, 0)}  # fmt: skip
"""Compute capabilities of kernels that others lack."""


class Case(Protocol):
    """What one process does."""

    @property
    def kernel(self) -> str: ...

    @property
    def name(self) -> str: ...

    def skipped(self, capability: tuple[int, int]) -> str:
        """Why a GPU of this compute capability does not run it, or nothing."""

    def run(self) -> None:
        """Raises where the result is wrong."""


@dataclass(frozen=True)
class Product:
    """A linear layer, so large that an H100 takes this kernel and tile; others may take another."""

    kernel: str
    tile: int
    """Rows of a block for few tokens, else tokens."""
    rows: int
    inputs: int
    tokens: int
    split: bool = False
    permuted: bool = True
    int8: bool = False

    @property
    def name(self) -> str:
        few = self.kernel == "few_tokens"
        tile = f"{self.tokens} tokens, {self.tile} rows" if few else f"{self.tile} tokens"
        return f"{self.kernel}, {tile}{', int8' * self.int8}{', split' * self.split}"

    def skipped(self, capability: tuple[int, int]) -> str:
        needed = NEEDS.get(self.kernel, capability)
        if capability != needed:
            return f"of compute capability {needed[0]}.{needed[1]} alone"
        built = torch.ops.permllm.cutlass_architectures().split()
        there = self.kernel not in NEEDS or f"{needed[0]}{needed[1]}" in built
        return "" if there else "this build lacks it"

    def run(self) -> None:
        make = int8_layer if self.int8 else random_layer
        layer = make(self.rows, self.inputs, permuted=self.permuted, bias=True)
        x = torch.randn(self.tokens, self.inputs, device=CUDA).bfloat16()
        OnGpu(layer, torch.bfloat16).check(x)


@dataclass(frozen=True)
class Permutation:
    """The pass in front of products."""

    kernel: str = "permute"
    name: str = "permute"

    def skipped(self, capability: tuple[int, int]) -> str:
        return ""

    def run(self) -> None:
        places = torch.stack([torch.randperm(128) for _ in range(4)]).to(CUDA)
        x = torch.randn(200, 512, device=CUDA).bfloat16()
        y = torch.ops.permllm.permute_inputs(x, places.flatten().to(torch.uint8))
        absolute = places + 128 * torch.arange(4, device=CUDA)[:, None]
        assert torch.equal(y, x[:, absolute.flatten()])


@dataclass(frozen=True)
class SeveralExperts:
    """Layers of experts, which have 64 pairs and more on average where they are multiplied many."""

    kernel: str
    experts: int
    tokens: int

    @property
    def name(self) -> str:
        return f"experts, {self.kernel}"

    def skipped(self, capability: tuple[int, int]) -> str:
        return ""

    def run(self) -> None:
        layer = Experts(self.experts, 256, 128)
        x = torch.randn(self.tokens, 256, device=CUDA).bfloat16()
        layer.check(x, *routed(self.tokens, 2, self.experts))


PRODUCTS = (
    Product("few_tokens", 128, 500, 512, 8),
    Product("few_tokens", 128, 500, 4096, 8, split=True),
    Product("few_tokens", 128, 500, 512, 8, int8=True),
    Product("few_tokens", 128, 500, 512, 64),
    Product("few_tokens", 128, 500, 4096, 64, split=True),
    Product("few_tokens", 192, 17000, 512, 64),
    Product("few_tokens", 192, 8500, 1024, 64, split=True),
    Product("few_tokens", 256, 25600, 512, 64),
    Product("few_tokens", 256, 12800, 2048, 64, split=True),
    Product("few_tokens", 128, 500, 4096, 200, split=True),
    # Rows of y that TMA cannot write, else it were CUTLASS' kernel.
    Product("many_tokens_mma", 128, 500, 704, 300),
    Product("many_tokens_mma", 128, 504, 704, 300, int8=True),
    *(
        Product(kernel, tile, rows, 704, tokens, permuted=False)
        for kernel in ("many_tokens_sm90", "many_tokens_sm100")
        for tile, rows, tokens in ((64, 504, 100), (128, 8504, 100), (256, 6264, 300))
    ),
    Product("many_tokens_sm90_permuting", 32, 504, 704, 100),
    Product("many_tokens_sm90_permuting", 64, 4864, 704, 100),
)
EXPERTS = (SeveralExperts("few_pairs", 8, 24), SeveralExperts("many_pairs", 4, 300))


def in_turns(cases: Iterable[Case]) -> tuple[Case, ...]:
    """The first of each kernel before the second of any: time may be short, as where all hang."""
    before: Counter[str] = Counter()
    turns: dict[int, list[Case]] = {}
    for case in cases:
        turns.setdefault(before[case.kernel], []).append(case)
        before[case.kernel] += 1
    return tuple(case for turn in turns.values() for case in turn)


CASES = in_turns((Permutation(), *PRODUCTS, *EXPERTS))
