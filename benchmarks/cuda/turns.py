"""Contestants that take turns on a GPU: whatever its clock does falls on all of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

Call = Callable[[Tensor], Tensor]
"""Multiplies activations with one copy of a weight."""
Turn = Callable[[], float]
"""Runs once what is measured; microseconds of one call."""
LEAST_CALLS = 32
"""Of a graph: whatever its start takes on the GPU is spread over them."""
HEAD_START = 1_000_000
"""Clocks that the GPU sleeps in front of a graph, about half a millisecond."""


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
    """A CUDA graph that makes `calls` in turn, and over again; its turn is one replay.

    The calls take their activations from `inputs`, one after the other and over again. Whoever
    replays the graph keeps `inputs`: it knows only where they are.
    """
    order = rotation(len(calls), len(inputs))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call(inputs[0])
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight, given in order:
            calls[weight](inputs[given])

    def turn() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Without it the GPU would stand still between `start` and the launch, which takes the host
        # microseconds.
        torch.cuda._sleep(HEAD_START)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3 / len(order)

    return turn


def rotation(calls: int, inputs: int) -> list[tuple[int, int]]:
    """Which call is made with which input: whole rounds of the calls, LEAST_CALLS at least.

    Between two uses of a call lie all others, so that the cache has forgotten its weight.
    """
    rounds = math.ceil(LEAST_CALLS / calls)
    return [(index % calls, index % inputs) for index in range(rounds * calls)]
