"""Contestants that take turns on a GPU: whatever its clock does falls on all of them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks.cuda.contestants import Call

Turn = Callable[[], float]
"""Runs once what is measured; microseconds of one call."""


def medians(turns: Mapping[str, Turn], repeats: int) -> dict[str, float]:
    """Median microseconds of each, of rounds in which each has a turn; the first only warms up."""
    found: dict[str, list[float]] = {name: [] for name in turns}
    for round_ in range(repeats + 1):
        for name, turn in turns.items():
            us = turn()
            if round_ > 0:
                found[name].append(us)
    return {name: statistics.median(times) for name, times in found.items()}


def captured(calls: Sequence[Call], inputs: Sequence[Tensor]) -> Turn:
    """A CUDA graph that makes each of `calls` once, in turn; its turn is one replay.

    The calls take their activations from `inputs`, one after the other and over again. Whoever
    replays the graph keeps `inputs`: it knows only where they are.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call(inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index, call in enumerate(calls):
            call(inputs[index % len(inputs)])

    def turn() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(calls)

    return turn
