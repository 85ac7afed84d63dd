"""Ways to multiply on the CPU: dense ones of PyTorch and vLLM, and the sparse kernels."""

from __future__ import annotations

import itertools
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.cpu.products import LIMITS, Exact, activations
from benchmarks.shapes import Layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend

POOL_BYTES = 256 << 20
"""Of one contestant's weights: many times the cache. Where the system names one of 480 MiB, shared
with others, 512 and 1024 MiB give the same times, and 64 would be served by it."""
VLLM_INT8 = "vllm int8"
ENOUGH_CALLS, ENOUGH_SECONDS = 3, 2.0
"""Whoever needs more than both in all rounds takes fewer turns: where the CPU multiplies no
bfloat16, PyTorch takes seconds for 256 tokens."""
Call = Callable[[Tensor], Tensor]
Make = Callable[[Tensor], Call]


class Timed(Protocol):
    """What takes its turn."""

    def time(self, x: Tensor, clock: Callable[[], float]) -> float:
        """Seconds of a call."""

    def checked(self, x: Tensor) -> float:
        """The relative error of a call; raises WrongProduct where it is above the limit."""


class Contestant:
    """One way to multiply, with copies of the weight that are used in turn.

    Args:
        name: for errors.
        weight_bytes: of one copy.
        make: makes a copy.
        dense: what it stands for, `[out, in]`.
        limit: of its relative error, from `products.LIMITS`.
        dtype: of the activations that it takes.
    """

    def __init__(
        self,
        name: str,
        weight_bytes: int,
        make: Callable[[], Call],
        dense: Tensor,
        limit: float,
        dtype: torch.dtype = torch.bfloat16,
    ):
        self._name, self._dense, self._limit, self._dtype = name, dense, limit, dtype
        self.weight_bytes = weight_bytes
        self._copies = max(2, math.ceil(POOL_BYTES / weight_bytes))
        self._calls = itertools.cycle([make() for _ in range(self._copies)])

    def warm(self) -> None:
        """Reads every copy once: the first read after allocation is not what is measured.

        Raises:
            WrongProduct: the product of a copy is wrong.
        """
        x = activations(1, self._dense.shape[1], self._dtype)
        exact = Exact(x, self._dense)
        for _ in range(self._copies):
            exact.require(self._name, next(self._calls)(x), self._limit)

    def time(self, x: Tensor, clock: Callable[[], float]) -> float:
        call = next(self._calls)
        start = clock()
        call(x)
        return clock() - start

    def checked(self, x: Tensor) -> float:
        """The relative error of the next copy; raises WrongProduct where it is above the limit."""
        return Exact(x, self._dense).require(self._name, next(self._calls)(x), self._limit)


def dense_contestants(makers: dict[str, Make], dense: Tensor) -> dict[str, Contestant]:
    """Contestants by name for one dense weight `[out, in]`, ready to be timed.

    They take activations of its dtype.

    Raises:
        WrongProduct: one multiplies by something else.
    """
    found = {
        name: Contestant(
            name,
            dense.numel() * (1 if name == VLLM_INT8 else dense.element_size()),
            lambda make=make: make(dense),  # type: ignore[misc]
            dense,
            LIMITS["int8" if name == VLLM_INT8 else "bfloat16"],
            dense.dtype,
        )
        for name, make in makers.items()
    }
    for contestant in found.values():
        contestant.warm()
    return found


def sparse_contestant(
    name: str, layer: Layer, backend: CpuBackend, dtype: torch.dtype = torch.bfloat16
) -> Contestant:
    """The sparse kernel on one layer, ready to be timed; raises WrongProduct as the dense ones."""
    size, values = backend.pack(layer.weights).packed.numel(), layer.weights.values.dtype
    limit = LIMITS["int8" if values == torch.int8 else "bfloat16"]
    found = Contestant(name, size, lambda: sparse_linear(layer, backend), layer.dense, limit, dtype)
    found.warm()
    return found


def median_times(
    contestants: Mapping[str, Timed], x: Tensor, threads: int, rounds: int
) -> dict[str, float]:
    """Median microseconds by name, called in turn: thread-CPU time, or wall time of threads.

    Every round has an order of its own: who leaves written lines in the caches, as oneDNN does when
    it widens a weight, would always take memory's time from the same one. Slow ones take turns in
    some of the rounds.

    Raises:
        WrongProduct: the product of one with these inputs is wrong; nothing is timed then.
    """
    for contestant in contestants.values():
        contestant.checked(x)
    clock = time.thread_time if threads == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in contestants}
    turns = dict.fromkeys(contestants, rounds)
    order, shuffled = list(contestants.items()), random.Random(0)
    for turn in range(rounds + 1):
        shuffled.shuffle(order)
        for name, contestant in order:
            if turn > 0 and turn * turns[name] // rounds == (turn - 1) * turns[name] // rounds:
                continue
            seconds = contestant.time(x, clock)
            if turn > 0:  # the first call allocates
                times[name].append(seconds)
            else:
                enough = max(ENOUGH_CALLS, int(ENOUGH_SECONDS / max(seconds, 1e-9)))
                turns[name] = min(rounds, enough)
    return {name: statistics.median(values) * 1e6 for name, values in times.items()}


def rounds_of(m: int, quick: bool) -> int:
    """How often to call with `m` tokens: long calls are steadier."""
    if m > 16:
        return 5 if quick else 9
    return 9 if quick else 25


def peer_makers(*, int8: bool) -> dict[str, Make]:
    """Dense peers by name, in bfloat16 and, if asked for, vLLM's W8A8; vLLM's where it is there."""
    found: dict[str, Make] = {"torch": _torch_linear}
    if has_vllm():
        found["vllm"] = _vllm_linear
        if int8:
            found[VLLM_INT8] = _vllm_int8_linear
    return found


def sparse_linear(layer: Layer, backend: CpuBackend) -> Call:
    """The sparse kernel on one packed copy of the layer."""
    packed = backend.pack(layer.weights)
    n, pattern = layer.dense.shape[0], str(layer.weights.pattern)

    def call(x: Tensor) -> Tensor:
        return ops.sparse_linear(
            x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, n, pattern
        )

    return call


def has_vllm() -> bool:
    """Whether vLLM's operators are there to compare with."""
    try:
        import vllm._custom_ops  # noqa: F401
    except ImportError:
        return False
    return True


def _torch_linear(dense: Tensor) -> Call:
    weight = dense.clone()
    return lambda x: torch.nn.functional.linear(x, weight)


def _vllm_layer(dense: Tensor) -> Any:
    """A layer with `cpu_linear`, vLLM's choice; its weight is empty where that has packed it."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = torch.nn.Module()
    layer.weight = torch.nn.Parameter(dense.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    return layer


def _vllm_linear(dense: Tensor) -> Call:
    """vLLM's choice for a dense layer on this CPU (onednn_mm for all but small weights)."""
    layer = _vllm_layer(dense)
    return lambda x: layer.cpu_linear(x, layer.weight, None)


def _vllm_int8_linear(dense: Tensor) -> Call:
    """vLLM's W8A8 with a scale per output channel and per token (onednn_scaled_mm).

    oneDNN copies the values and keeps only the address of the scale: whoever multiplies holds it.
    """
    from vllm import _custom_ops

    scale = dense.float().abs().amax(dim=1, keepdim=True).clamp_min(1e-6) / 127
    values = (dense.float() / scale).round().to(torch.int8)
    handler = _custom_ops.create_onednn_scaled_mm(
        values.t(), scale, torch.bfloat16, True, False, 32
    )
    held = handler, scale

    def call(x: Tensor) -> Tensor:
        quantized, x_scale, _ = _custom_ops.onednn_scaled_int8_quant(x)
        y = torch.empty(x.shape[0], dense.shape[0], dtype=x.dtype)
        return _custom_ops.onednn_scaled_mm(held[0], quantized, y, x_scale, None, None, None)

    return call
