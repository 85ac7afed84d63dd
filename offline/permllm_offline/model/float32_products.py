"""Products of bfloat16 and float16 in float32, on CPUs that multiply neither.

What PyTorch has there instead of a matrix product takes as long for each token as for the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

CHUNK_ELEMENTS = 1 << 20
"""Of a weight, widened at a time: no copy of a large layer, let alone of a head, is made."""
LEAST_TOKENS = 4
"""Fewer are multiplied sooner in 16 bits."""
_slow: ContextVar[frozenset[torch.dtype]] = ContextVar("slow_dtypes", default=frozenset())
"""Of the products that this thread takes in float32."""


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Within it, linear layers take the faster way, in training too.

    That is, what calls `torch.nn.functional.linear` by this name, as `torch.nn.Linear` does.
    Results are rounded once to the dtype of the layer, as PyTorch's are. Nothing changes for what
    the CPU multiplies, and on other devices. A backward pass is outside, as are activations that it
    computes again: see `contexts_of_recomputation`.
    """
    slow = slow_dtypes()
    if not slow:
        yield
        return
    token = _slow.set(slow)
    try:
        with _replacement:
            yield
    finally:
        _slow.reset(token)


def contexts_of_recomputation() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """What `torch.utils.checkpoint` enters: to compute now, and again as it was computed now."""
    return nullcontext(), products_in_float32() if _slow.get() else nullcontext()


def slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes of 16 bits of which this CPU has no products."""
    if not torch.backends.mkldnn.is_available():
        return frozenset()
    found = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in found.items() if not supported)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a [..., k] @ b [k, n]`, in float32 where that is faster; for code with its own gradients."""
    if not _is_slow(a, b):
        return a @ b
    wide = a.float()
    y = a.new_empty(*a.shape[:-1], b.shape[1])
    for columns in _chunks(b.shape[1], b.shape[0]):
        y[..., columns] = wide @ b[:, columns].float()
    return y


def batched_product(a: Tensor, b: Tensor) -> Tensor:
    """`a [blocks, m, k] @ b [blocks, k, n]`; in float32, and so returned, where that is faster."""
    return a.float() @ b.float() if _is_slow(a, b) else a @ b


def _is_slow(a: Tensor, b: Tensor) -> bool:
    same = a.dtype == b.dtype and a.device == b.device
    return same and a.device.type == "cpu" and a.dtype in slow_dtypes()


def _faster_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the place of `torch.nn.functional.linear`."""
    taken = _linear if _takes(input, weight, bias) else _replacement.original
    return taken(input, weight, bias)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _Linear.apply(input.reshape(-1, weight.shape[1]), weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])


def _takes(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """What does not fit is left to PyTorch, which says why."""
    given = [tensor for tensor in (input, weight, bias) if tensor is not None]
    return (
        weight.dtype in _slow.get()
        and all(tensor.dtype == weight.dtype for tensor in given)
        and all(tensor.device.type == "cpu" for tensor in given)
        and weight.dim() == 2
        and input.dim() > 0
        and input.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
        and input.numel() >= LEAST_TOKENS * weight.shape[1] > 0
    )


class _Replacement:
    """Of PyTorch's function, as long as any thread wants it.

    A `TorchFunctionMode` would be asked about every operator and every attribute of a tensor.
    """

    def __init__(self) -> None:
        self._lock, self._users, self.original = Lock(), 0, functional.linear

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self.original = functional.linear
                functional.linear = _faster_linear
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                functional.linear = self.original


_replacement = _Replacement()


class _Linear(torch.autograd.Function):
    """`x [tokens, in]` times `weight [out, in]`, and its gradients, all products in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        of_x, of_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        wide = x.float()
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows in _chunks(*weight.shape):
            products = wide @ weight[rows].float().t()
            y[:, rows] = products if bias is None else products.add_(bias[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_y = gradients[0]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            total = torch.zeros(of_y.shape[0], weight.shape[1])
            for rows in _chunks(*weight.shape):
                total.addmm_(of_y[:, rows].float(), weight[rows].float())
            of_x = total.to(of_y.dtype)
        if ctx.needs_input_grad[1]:
            wide = x.float()
            of_weight = x.new_empty(of_y.shape[1], x.shape[1])
            for rows in _chunks(*of_weight.shape):
                of_weight[rows] = of_y[:, rows].float().t() @ wide
        if ctx.needs_input_grad[2]:
            of_bias = of_y.float().sum(0).to(of_y.dtype)
        return of_x, of_weight, of_bias


def _chunks(count: int, length: int) -> list[slice]:
    """`count` rows or columns of so many elements, as many together as are widened at a time."""
    together = max(1, CHUNK_ELEMENTS // max(1, length))
    return [slice(first, first + together) for first in range(0, count, together)]
