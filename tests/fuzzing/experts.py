"""The target that calls the operator of mixture-of-experts layers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from benchmarks.shapes import random_layer
from permllm_vllm.backends import StackedWeights
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from tests.fuzzing.choices import Choices
from tests.fuzzing.operators import (
    ERRORS,
    NUMBERS,
    TOKENS,
    as_int8,
    int8_dense,
    reshaped,
    tensor,
)
from tests.fuzzing.outcome import Finding, Refused, refusing
from tests.kernels.test_experts import RELU2, between

EXPERTS, CHOSEN, WIDTH = 3, 2, 128
X, WEIGHTS, IDS = 0, 1, 2
BLOBS, METADATA, OPTIONAL = (3, 7), (4, 8), (5, 6, 9, 10)
"""Places of the operator's arguments."""
LARGEST_ERROR = 0.05
"""Of an answer, beside its norm: rounding to int8 does 0.02."""


@dataclass(frozen=True)
class Stacked:
    """One linear layer of all experts, as one instruction set packs it, and its dense weights."""

    weights: StackedWeights
    dense: Tensor


@cache
def layers() -> list[tuple[Stacked, Stacked]]:
    """Gate and up, or up alone, and down, of every instruction set, kind of values and blocks."""
    return [
        (stacked(isa, outputs, block, int8=int8), stacked(isa, WIDTH, block, int8=int8))
        for outputs in (2 * WIDTH, WIDTH)
        for isa in instruction_sets()
        for int8 in (False, True)
        for block in (64, 128)
    ]


def stacked(isa: str, outputs: int, block: int, *, int8: bool) -> Stacked:
    backend = CpuBackend(isa)
    packed, dense = [], []
    for expert in range(EXPERTS):
        layer = random_layer(outputs, WIDTH, block_size=block, seed=outputs + expert)
        weights = as_int8(layer.weights) if int8 else layer.weights
        packed.append(backend.pack(weights))
        dense.append(int8_dense(layer, weights) if int8 else layer.dense.float())
    return Stacked(backend.stack(packed), torch.stack(dense))


def experts(data: bytes) -> None:
    """sparse_experts: damaged metadata and blobs, routing and tensors of any shape and dtype."""
    choices = Choices(data)
    pair = choices.pick(layers())
    generator = torch.Generator().manual_seed(1)
    tokens = choices.pick(TOKENS)
    x = torch.randn(tokens, WIDTH, generator=generator)
    weights, ids = torch.rand(tokens, EXPERTS, generator=generator).topk(CHOSEN)
    arguments: list[Tensor | None] = [
        x.to(torch.float16 if choices.once_in(4) else torch.bfloat16),
        weights,
        ids.to(torch.int32),
    ]
    for part in pair:
        one = part.weights
        arguments += [one.packed, one.metadata, one.permutation, one.scale]
    gated = pair[0].dense.shape[1] == 2 * WIDTH
    activation = RELU2 if not gated else choices.below(RELU2)
    fits = exact = True
    if choices.once_in(8):
        activation = choices.below(RELU2 + 2)
        fits = activation <= RELU2 and (activation == RELU2) == (not gated)
    for _ in range(choices.below(3)):
        exact &= damage(choices, arguments)
    try:
        y: Tensor = refusing(
            lambda: torch.ops.permllm.sparse_experts(*arguments, WIDTH, activation), *ERRORS
        )
    except Refused:
        if exact and fits:
            raise Finding("good arguments were refused") from None
        return
    if exact and not fits:
        raise Finding(f"activation {activation} was taken for experts of another form")
    rows, weight, chosen = (arguments[place] for place in (X, WEIGHTS, IDS))
    assert rows is not None
    assert weight is not None
    assert chosen is not None
    if y.shape[0] != rows.shape[0] or y.dtype != rows.dtype:
        raise Finding(f"{y.dtype} {tuple(y.shape)} for {rows.dtype} {tuple(rows.shape)} inputs")
    if exact:
        expected = by_loops(rows.float(), weight, chosen, pair, activation)
        off = (y.float() - expected).norm() / expected.norm().clamp_min(1e-3)
        if not bool(off < LARGEST_ERROR):
            raise Finding(f"wrong numbers: off by {float(off)} of their norm")


def by_loops(
    x: Tensor, weights: Tensor, ids: Tensor, pair: tuple[Stacked, Stacked], activation: int
) -> Tensor:
    """What the experts of each token give, one after the other."""
    y = torch.zeros(len(x), WIDTH)
    for token, row in enumerate(x):
        for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
            if expert < 0:
                continue
            inner = between(pair[0].dense[expert] @ row, activation)
            y[token] += weight * (pair[1].dense[expert] @ inner)
    return y


def damage(choices: Choices, arguments: list[Tensor | None]) -> bool:
    """Change one argument; True where the answer must stay right."""
    how = choices.below(8)
    if how == 0 and arguments[X] is not None and arguments[X].dim() == 2:
        arguments[X] = choices.pick(
            (arguments[X].t().contiguous().t(), arguments[X].repeat_interleave(2, -1)[:, ::2])
        )
        return True
    place = choices.pick(METADATA) if how in (1, 2) else choices.pick((*BLOBS, IDS))
    given = arguments[place]
    if how <= 4 and given is not None and given.numel():
        changed = arguments[place] = given.clone()
        flat = changed.view(-1)
        at = choices.below(flat.numel())
        if flat.dtype == torch.int64:  # metadata
            value = choices.pick(NUMBERS) + 64 * (choices.below(9) - 4)
            flat[at] = max(min(value, 2**63 - 1), -(2**63))
        elif flat.dtype == torch.int32:  # numbers of experts
            flat[at] = choices.below(EXPERTS + 3) - 2
        elif flat.dtype == torch.uint8:
            flat[at] = choices.below(256)
        return False
    if how == 5:
        arguments[choices.pick(OPTIONAL)] = None
        return False
    place = choices.below(len(arguments))
    given = arguments[place]
    arguments[place] = tensor(choices) if given is None else reshaped(choices, given)
    return False
