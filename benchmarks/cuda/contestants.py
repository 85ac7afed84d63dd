"""Ways to multiply with a pruned weight on a GPU, ours and PyTorch's.

Each makes several calls, with as many copies of its weight: what it takes to make the weight is
done once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.shapes import Layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights, PackedWeights
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint import permutation as permutations

OURS = "permllm"
UNPERMUTED = "permllm, no permutation"
PASS = "permute + permllm"
INT8 = "permllm, int8"
OWN = (OURS, UNPERMUTED, PASS, INT8)
NO_PERMUTATION = "no permutation"
"""What the name of a forced kernel has behind a comma, or `int8`, as in UNPERMUTED and INT8."""
DENSE = "cublas"
WEIGHT_BYTES = {DENSE: 2.0, INT8: 0.625}  # per weight; of the others:
SPARSE_BYTES = 1.125
CUDA = torch.device("cuda")
Call = Callable[[Tensor], Tensor]
Weights = TypeVar("Weights", CheckpointWeights, PackedWeights)


def on_gpu(layer: Layer) -> Layer:
    """The same layer there: every contestant begins with it."""
    weights = _each(layer.weights, lambda tensor: tensor.to(CUDA))
    bias = None if layer.bias is None else layer.bias.to(CUDA)
    return Layer(weights, layer.dense.to(CUDA), bias)


def _each(weights: Weights, change: Callable[[Tensor], Tensor]) -> Weights:
    """The same with every tensor changed."""
    changed: dict[str, Any] = {
        name: change(value) for name, value in vars(weights).items() if torch.is_tensor(value)
    }
    return dataclasses.replace(weights, **changed)


def _dense(layer: Layer, count: int) -> list[Call]:
    def call(weight: Tensor) -> Call:
        return lambda x: torch.nn.functional.linear(x, weight)

    return [call(layer.dense.clone()) for _ in range(count)]


def with_values_of(name: str, layer: Layer) -> Layer:
    """The layer that a contestant is made from."""
    return to_int8(layer) if name.endswith(", int8") else layer


def _ours(layer: Layer, count: int) -> list[Call]:
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    copies = [_each(packed, torch.clone) for _ in range(count)]
    if packed.packed.is_cuda:
        # The kernels request weights before the kernel in front of them has ended.
        torch.cuda.synchronize(CUDA)
    n = layer.dense.shape[0]

    def call(copy: PackedWeights) -> Call:
        return lambda x: ops.sparse_linear(
            x, copy.packed, copy.metadata, copy.permutation, copy.scale, None, n, "2:4"
        )

    return [call(copy) for copy in copies]


def _unpermuted(layer: Layer, count: int) -> list[Call]:
    weights = dataclasses.replace(layer.weights, permutation=None)
    return _ours(dataclasses.replace(layer, weights=weights), count)


def _after_pass(layer: Layer, count: int) -> list[Call]:
    """Our product after our permutation kernel, also where the operator would not use that."""
    return [_permuting(layer, multiply) for multiply in _unpermuted(layer, count)]


def _permuting(layer: Layer, multiply: Call) -> Call:
    """Our permutation kernel in front of a product."""
    weights = layer.weights
    assert weights.permutation is not None
    places = permutations.absolute(weights.permutation, weights.block_size) % 128
    places = places.to(torch.uint8)
    return lambda x: multiply(torch.ops.permllm.permute_inputs(x, places))


def permuted_dense(layer: Layer) -> Tensor:
    """The weight with zeros in permuted order."""
    weights = layer.weights
    assert weights.permutation is not None
    return permutations.permute_columns(layer.dense, weights.permutation, weights.block_size)


def multiplied(name: str, layer: Layer) -> Tensor:
    """What a contestant made from this layer multiplies with, in the order of its inputs."""
    return permuted_dense(layer) if name.endswith(f", {NO_PERMUTATION}") else layer.dense


class UnavailableError(NotImplementedError):
    """A contestant runs on no shape here."""


class FastestAlgorithm:
    """cuSPARSELt's fastest algorithm, searched once for every shape and number of tokens.

    The search measures: a shape must have been called once before it is captured in a graph.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], dict[str, Any]] = {}

    def __call__(self, n: int, compressed: Tensor, x: Tensor) -> dict[str, Any]:
        """Arguments of the product of `x [tokens, inputs]`, a compressed weight of `n` outputs."""
        key = (n, *x.shape)
        if key not in self._found:
            self._found[key] = self._search(compressed, x.t())
        return self._found[key]

    @staticmethod
    def _search(compressed: Tensor, x: Tensor) -> dict[str, Any]:
        search = getattr(getattr(torch._C, "_cusparselt", None), "mm_search", None)
        if search is None:  # what is public tells of no split
            return {"alg_id": torch._cslt_sparse_mm_search(compressed, x, transpose_result=True)}
        found = search(compressed, x, None, None, None, True)  # names no arguments
        return dict(zip(("alg_id", "split_k", "split_k_mode"), found, strict=False))


_fastest_algorithm = FastestAlgorithm()


def _cusparselt(layer: Layer, count: int) -> list[Call]:
    """cuSPARSELt with its fastest algorithm, after our permutation kernel."""
    n = layer.dense.shape[0]
    compressed = torch._cslt_compress(permuted_dense(layer))

    def call(weight: Tensor) -> Call:
        def multiply(x: Tensor) -> Tensor:
            padding = -x.shape[0] % 8  # its tokens come in eights
            padded = torch.nn.functional.pad(x, (0, 0, 0, padding)) if padding else x
            fastest = _fastest_algorithm(n, weight, padded)
            y = torch._cslt_sparse_mm(weight, padded.t(), transpose_result=True, **fastest)
            return y[: x.shape[0]]

        return _permuting(layer, multiply)

    return [call(compressed.clone()) for _ in range(count)]


def _semi_structured(layer: Layer, count: int) -> list[Call]:
    """PyTorch's own CUTLASS path (sm_80), after our permutation kernel."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    major, minor = torch.cuda.get_device_capability(CUDA)
    if major != 8:
        raise UnavailableError(f"it takes compute capability 8.x, this GPU has {major}.{minor}")
    dense = permuted_dense(layer)

    def call() -> Call:
        # Not to_sparse_semi_structured, which takes cuSPARSELt wherever it is. On the GPU in a
        # moment, so that it need not be known how to copy what it returns.
        weight = SparseSemiStructuredTensorCUTLASS.from_dense(dense)
        return _permuting(layer, lambda x: torch.nn.functional.linear(x, weight))

    return [call() for _ in range(count)]


CONTESTANTS: dict[str, Callable[[Layer, int], list[Call]]] = {
    OURS: _ours,
    UNPERMUTED: _unpermuted,
    PASS: _after_pass,
    INT8: _ours,
    DENSE: _dense,
    "permute + cusparselt": _cusparselt,
    "permute + pytorch cutlass": _semi_structured,
}


def maker(name: str) -> Callable[[Layer, int], list[Call]]:
    """What makes a contestant: of CONTESTANTS, or a kernel that is forced (docs/cuda.md).

    NO_PERMUTATION or `int8` may follow the latter, behind a comma.
    """
    if name in CONTESTANTS:
        return CONTESTANTS[name]
    kernel, _, option = name.partition(", ")
    make = _unpermuted if option == NO_PERMUTATION else _ours

    def forced(multiply: Call) -> Call:
        def call(x: Tensor) -> Tensor:
            torch.ops.permllm.force_linear_kernel(kernel)
            try:
                return multiply(x)
            finally:
                torch.ops.permllm.force_linear_kernel("")

        return call

    return lambda layer, count: [forced(multiply) for multiply in make(layer, count)]
