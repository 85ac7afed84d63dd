"""Linear layers of bfloat16 and float16 in float32, on CPUs that multiply neither.

What PyTorch has there instead of a matrix product is five to ten times slower than float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

CHUNK_ELEMENTS = 1 << 22
"""Of a weight, widened at a time: no copy of a layer, let alone of a head, is made."""


@contextmanager
def products_in_float32() -> Iterator[None]:
    """Within it, linear layers take the faster way, in training too.

    Results are rounded once to the dtype of the layer, as PyTorch's are. Nothing changes for what
    the CPU multiplies, and on other devices.
    """
    slow = slow_dtypes()
    if not slow:
        yield
        return
    with _Float32Products(slow):
        yield


def slow_dtypes() -> frozenset[torch.dtype]:
    """The dtypes of 16 bits of which this CPU has no products."""
    found = {
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    return frozenset(dtype for dtype, supported in found.items() if not supported)


class _Float32Products(TorchFunctionMode):
    """Replaces `torch.nn.functional.linear` for some dtypes on the CPU."""

    def __init__(self, slow: frozenset[torch.dtype]) -> None:
        super().__init__()
        self._slow = slow

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        arguments: Sequence[Any] = (),
        options: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is functional.linear and self._takes(*arguments, **(options or {})):
            return _linear(*arguments, **(options or {}))
        return function(*arguments, **(options or {}))

    def _takes(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
        given = [tensor for tensor in (input, weight, bias) if tensor is not None]
        same = {tensor.dtype for tensor in given} == {weight.dtype}
        on_cpu = all(tensor.device.type == "cpu" for tensor in given)
        return same and on_cpu and weight.dtype in self._slow and weight.dim() == 2


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = _Linear.apply(input.reshape(-1, weight.shape[1]), weight, bias)
    return y.view(*input.shape[:-1], weight.shape[0])


class _Linear(torch.autograd.Function):
    """`x [tokens, in]` times `weight [out, in]`, and its gradients, all products in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        wide = x.float()
        y = x.new_empty(x.shape[0], weight.shape[0])
        for rows in _chunks(weight):
            products = wide @ weight[rows].float().t()
            y[:, rows] = products if bias is None else products.add_(bias[rows])
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_y = gradients[0]
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            total = torch.zeros(x.shape)
            for rows in _chunks(weight):
                total.addmm_(of_y[:, rows].float(), weight[rows].float())
            of_x = total.to(x.dtype)
        if ctx.needs_input_grad[1]:
            wide = x.float()
            of_weight = torch.empty_like(weight)
            for rows in _chunks(weight):
                of_weight[rows] = (of_y[:, rows].float().t() @ wide).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            of_bias = of_y.float().sum(0).to(of_y.dtype)
        return of_x, of_weight, of_bias


def _chunks(weight: Tensor) -> list[slice]:
    """Rows of a weight that are widened together."""
    count = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return [slice(first, first + count) for first in range(0, weight.shape[0], count)]
