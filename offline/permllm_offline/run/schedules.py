"""In which order a training loop takes its windows, and how large its steps are."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def shuffled_batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield batches of window numbers without end, shuffled again before each round.

    Args:
        count: windows; at least ``size``.
        size: windows per batch; what is left of a round is dropped.
        seed: the same seed gives the same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator)[: count // size * size].split(size)


def warmed_cosine(step: int, steps: int, warmup_share: float) -> float:
    """Share of the peak learning rate at a step, 1..steps.

    It rises linearly over the first ``warmup_share`` of the steps, while Adam's second moment is
    still noise, and falls along a cosine to almost 0 at the last one.
    """
    warmup = max(1, round(steps * warmup_share))
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup + 1)))


def cosine(step: int, steps: int) -> float:
    """Share of the initial learning rate at a step, 1..steps: 1 at first, almost 0 at the last."""
    return 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
