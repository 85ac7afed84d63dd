"""Ways to multiply the experts of a layer on the CPU: vLLM's dense ones, and the sparse kernel."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cpu.products import LIMITS, WrongProduct, activations
from benchmarks.shapes import VALUES, ExpertShape, Layer, random_layer, to_int8
from permllm_vllm.backends.cpu import CpuBackend

OURS = "permllm"
VLLM, VLLM_INT8 = "vllm", "vllm int8"
CHECKED = 2
"""Tokens of a call whose result is held against the exact one."""
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From activations [tokens, hidden], and a router's weights and ids [tokens, choices]."""


@dataclass(frozen=True)
class ExpertWeights:
    """Gate and up, and down, of every expert; sparse ones and the same as dense weights."""

    shape: ExpertShape
    gate_up: list[Layer]
    down: list[Layer]

    def stacked(self) -> tuple[Tensor, Tensor]:
        """The dense weights as vLLM holds them: [experts, out, in] of gate and up, and of down."""
        both = self.gate_up, self.down
        gate_up, down = (torch.stack([layer.dense for layer in layers]) for layers in both)
        return gate_up, down

    def exact(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """What a call gives, in float64."""
        y = torch.zeros(x.shape, dtype=torch.float64)
        for token, row in enumerate(x.double()):
            for weight, expert in zip(weights[token].double(), ids[token].tolist(), strict=True):
                gate, up = (self.gate_up[expert].dense.double() @ row).chunk(2)
                gated = torch.nn.functional.silu(gate) * up
                y[token] += weight * (self.down[expert].dense.double() @ gated)
        return y


def random_experts(shape: ExpertShape) -> ExpertWeights:
    """Random 2:4 weights in bfloat16."""
    sizes = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    gate_up, down = (
        [random_layer(n, k, by_magnitude=True, seed=expert) for expert in range(shape.experts)]
        for n, k in sizes
    )
    return ExpertWeights(shape, gate_up, down)


class Contestant:
    """One way to multiply; calls go through the experts, tokens are spread evenly over them."""

    def __init__(self, name: str, weights: ExpertWeights, call: Call, size: int, limit: float):
        self.weight_bytes = size
        self._name, self._weights, self._call, self._limit = name, weights, call, limit
        self._starts = itertools.count(step=weights.shape.choices)

    def warm(self) -> None:
        """Reads every expert once: the first read after allocation is not what is measured."""
        shape = self._weights.shape
        tokens = math.ceil(shape.experts / shape.choices)
        self._call(activations(tokens, shape.hidden), *self._routes(tokens))

    def time(self, x: Tensor, clock: Callable[[], float]) -> float:
        """Seconds of a call."""
        weights, ids = self._routes(len(x))
        start = clock()
        self._call(x, weights, ids)
        return clock() - start

    def checked(self, x: Tensor) -> float:
        """The relative error of some tokens; raises WrongProduct where it is above the limit."""
        weights, ids = self._routes(len(x))
        found = self._call(x, weights, ids)[:CHECKED].double()
        exact = self._weights.exact(x[:CHECKED], weights[:CHECKED], ids[:CHECKED])
        error = float((found - exact).norm() / exact.norm())
        if not error <= self._limit:
            raise WrongProduct(
                f"{self._name} is not timed: what it gives for {len(x)} tokens is {error:.3g} from "
                f"the exact result, relative, and may be {self._limit:g} from it: mend it"
            )
        return error

    def _routes(self, tokens: int) -> tuple[Tensor, Tensor]:
        shape = self._weights.shape
        numbers = next(self._starts) + torch.arange(tokens * shape.choices)
        ids = (numbers % shape.experts).view(tokens, shape.choices).to(torch.int32)
        return torch.full(ids.shape, 1 / shape.choices), ids


def contestants(weights: ExpertWeights) -> dict[str, Contestant]:
    """All ways of this machine by name, ready to be timed."""
    found = {f"{OURS} {values}": _sparse(weights, values) for values in VALUES}
    gate_up, down = weights.stacked()
    size = gate_up.nbytes + down.nbytes
    found[VLLM] = Contestant(VLLM, weights, _vllm(gate_up, down), size, LIMITS["bfloat16"])
    if torch.cpu._is_amx_tile_supported():
        call = _vllm_int8(gate_up, down)
        found[VLLM_INT8] = Contestant(VLLM_INT8, weights, call, size // 2, LIMITS["int8"])
    for contestant in found.values():
        contestant.warm()
    return found


def _sparse(weights: ExpertWeights, values: str) -> Contestant:
    backend, operands, size = CpuBackend(), [], 0
    for layers in (weights.gate_up, weights.down):
        made = map(to_int8, layers) if values == "int8" else layers
        stack = backend.stack([backend.pack(layer.weights) for layer in made])
        operands += [stack.packed, stack.metadata, stack.permutation, stack.scale]
        size += stack.packed.nbytes
    return Contestant(
        f"{OURS} {values}",
        weights,
        lambda x, router, ids: torch.ops.permllm.sparse_experts(
            x, router, ids, *operands, weights.shape.inner
        ),
        size,
        LIMITS[values],
    )


def _vllm(gate_up: Tensor, down: Tensor) -> Call:
    """vLLM's dense experts, by the instruction set that it takes here."""
    from vllm import _custom_ops

    isa = "amx" if torch.cpu._is_amx_tile_supported() else "vec"
    packed = [_custom_ops.cpu_prepack_moe_weight(one, isa) for one in (gate_up, down)]

    def call(x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _custom_ops.cpu_fused_moe(y, x, *packed, None, None, router, ids, "silu", isa)
        return y

    return call


def _vllm_int8(gate_up: Tensor, down: Tensor) -> Call:
    """vLLM's W8A8 with AMX, a scale per output channel and per token."""
    from vllm import _custom_ops

    scales = [one.float().abs().amax(2, keepdim=True) / 127 for one in (gate_up, down)]
    packed = [
        torch.ops._C.convert_weight_packed((one.float() / scale).round().to(torch.int8))
        for one, scale in zip((gate_up, down), scales, strict=True)
    ]
    method = _custom_ops.CPUQuantMethod.INT8_W8A8

    def call(x: Tensor, router: Tensor, ids: Tensor) -> Tensor:
        y = torch.empty_like(x)
        _custom_ops.fused_experts_cpu(
            y, x, *packed, router, ids, method, *scales, *[None] * 7, True
        )
        return y

    return call
