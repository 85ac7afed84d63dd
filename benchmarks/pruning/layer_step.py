"""What a learning step of one layer costs: the paper's dense loop, and this project's."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from benchmarks.pruning.dense_permutations import (
    LEARNING_RATE,
    WEIGHT_DECAY,
    DenseMaskedLinear,
    DensePermutation,
    SharedMatrix,
)
from benchmarks.resident_memory import ResidentGrowth
from permllm_offline.permutation.hardening import Hardener
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation
from permllm_offline.permutation.sinkhorn import sinkhorn
from permllm_offline.sparsity.importance import magnitude
from permllm_vllm.checkpoint.pattern import Pattern

PATTERN, BLOCK = Pattern(2, 4), 64
LOOPS = ("dense", "ours")


@dataclass(frozen=True)
class StepCost:
    """Median seconds of a learning step of one layer; growth of the resident memory at its peak.

    ``peak_mib`` counts from where the layer and its inputs are there, and is None where the system
    does not let a process reset its peak.
    """

    loop: str
    width: int
    seconds: float
    peak_mib: float | None
    assignments: int


class LayerStep:
    """One learning step of one square layer against random inputs, by either loop."""

    def __init__(self, loop: str, width: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        linear = nn.Linear(width, width, bias=False).requires_grad_(False)
        linear = linear.to(torch.bfloat16)
        self._inputs = torch.randn((tokens, width), generator=generator).to(torch.bfloat16)
        self._target = self._inputs @ linear.weight.t()
        scores = magnitude(linear.weight, None)
        self.assignments = 0
        if loop == "dense":
            permutation = DensePermutation(width, BLOCK, generator).to(torch.bfloat16)
            self._shared = SharedMatrix(permutation)
            self._module: nn.Module = DenseMaskedLinear(linear, scores[:], PATTERN, self._shared)
            parameters = list(self._shared.permutation.parameters())
            self.take: Callable[[], None] = self._dense
        else:
            blocks = width // BLOCK
            noise = torch.rand((blocks, BLOCK, BLOCK), generator=generator)
            self._logits = nn.Parameter(noise)
            self._permutation = StepPermutation(torch.empty(0), torch.arange(blocks))
            self._module = PermutedMaskedLinear(linear, scores, PATTERN, self._permutation)
            self._hardener = Hardener()
            parameters = [self._logits]
            self.take = self._ours
        self._optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

    def _dense(self) -> None:
        self._shared.forget()
        self._backward()
        self.assignments += len(self._shared.permutation.weight)
        self._move()

    def _ours(self) -> None:
        soft = sinkhorn(self._logits, 1.0, 5)
        starts = torch.arange(len(self._logits))[:, None] * BLOCK
        self._permutation.order = (self._hardener(soft) + starts).flatten()
        self._permutation.soft = soft.detach().requires_grad_()
        self._backward()
        soft.backward(self._permutation.soft.grad)
        self.assignments = self._hardener.solved
        self._move()

    def _backward(self) -> None:
        output = self._module(self._inputs).float()
        (1 - functional.cosine_similarity(output, self._target.float(), dim=-1).mean()).backward()

    def _move(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def measure_step(loop: str, width: int, tokens: int, steps: int) -> StepCost:
    """Time steps of one loop at one width, in this process."""
    step = LayerStep(loop, width, tokens)
    growth, seconds = ResidentGrowth(), []
    for _ in range(steps):
        start = time.perf_counter()
        step.take()
        seconds.append(time.perf_counter() - start)
    peak = growth.peak_bytes()
    mib = None if peak is None else peak / 2**20
    return StepCost(loop, width, sorted(seconds)[steps // 2], mib, step.assignments)


def step_costs(widths: tuple[int, ...], tokens: int, steps: int) -> list[StepCost]:
    """Every loop at every width, each in a fresh process, one after the other."""
    context = multiprocessing.get_context("spawn")
    costs = []
    for width in widths:
        for loop in LOOPS:
            with context.Pool(1) as pool:
                costs.append(pool.apply(measure_step, (loop, width, tokens, steps)))
    return costs
