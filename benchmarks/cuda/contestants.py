"""Ways to multiply with a pruned weight on a GPU, ours and PyTorch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.shapes import Layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cuda import CudaBackend
from permllm_vllm.checkpoint import permutation as permutations

OURS = "permllm"
UNPERMUTED = "permllm, no permutation"
PASS = "permute + permllm"
INT8 = "permllm, int8"
OWN = (OURS, UNPERMUTED, PASS, INT8)
DENSE = "cublas"
WEIGHT_BYTES = {DENSE: 2.0, INT8: 0.625}  # per weight; of the others:
SPARSE_BYTES = 1.125
CUDA = torch.device("cuda")
Call = Callable[[Tensor], Tensor]


def _dense(layer: Layer) -> Call:
    weight = layer.dense.to(CUDA)
    return lambda x: torch.nn.functional.linear(x, weight)


def with_values_of(name: str, layer: Layer) -> Layer:
    """The layer that a contestant is made from."""
    return to_int8(layer) if name == INT8 else layer


def _ours(layer: Layer, *, permuted: bool = True) -> Call:
    weights = layer.weights
    changes: dict[str, Any] = {
        name: value.to(CUDA) for name, value in vars(weights).items() if torch.is_tensor(value)
    }
    if not permuted:
        changes["permutation"] = None
    packed = CudaBackend(torch.bfloat16).pack(dataclasses.replace(weights, **changes))
    n = layer.dense.shape[0]
    return lambda x: ops.sparse_linear(
        x, packed.packed, packed.metadata, packed.permutation, packed.scale, None, n, "2:4"
    )


def _after_pass(layer: Layer) -> Call:
    """Our product after our permutation kernel, also where the operator would not use that."""
    multiply, places = _ours(layer, permuted=False), permuted_dense(layer)[1]
    return lambda x: multiply(torch.ops.permllm.permute_inputs(x, places))


def permuted_dense(layer: Layer) -> tuple[Tensor, Tensor]:
    """The weight with zeros in permuted order, and the permutation in blocks of 128."""
    weights = layer.weights
    assert weights.permutation is not None
    dense = permutations.permute_columns(layer.dense, weights.permutation, weights.block_size)
    places = permutations.absolute(weights.permutation, weights.block_size) % 128
    return dense.to(CUDA), places.to(CUDA, torch.uint8)


def multiplied(name: str, layer: Layer) -> Tensor:
    """What a contestant made from this layer multiplies with, in the order of its inputs."""
    return permuted_dense(layer)[0] if name == UNPERMUTED else layer.dense.to(CUDA)


class FastestAlgorithm:
    """cuSPARSELt's fastest algorithm, searched once for every shape and number of tokens.

    The search measures: a shape must have been called once before it is captured in a graph.
    """

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], int] = {}

    def __call__(self, n: int, compressed: Tensor, x: Tensor) -> int:
        """For `x [tokens, inputs]` and a compressed weight of `n` outputs."""
        key = (n, *x.shape)
        if key not in self._found:
            self._found[key] = torch._cslt_sparse_mm_search(
                compressed, x.t(), transpose_result=True
            )
        return self._found[key]


_fastest_algorithm = FastestAlgorithm()


def _cusparselt(layer: Layer) -> Call:
    """cuSPARSELt with its fastest algorithm, after our permutation kernel."""
    dense, places = permuted_dense(layer)
    n = dense.shape[0]
    compressed = torch._cslt_compress(dense)

    def call(x: Tensor) -> Tensor:
        permuted = torch.ops.permllm.permute_inputs(x, places)
        padding = -x.shape[0] % 8  # its tokens come in eights
        if padding:
            permuted = torch.nn.functional.pad(permuted, (0, 0, 0, padding))
        algorithm = _fastest_algorithm(n, compressed, permuted)
        y = torch._cslt_sparse_mm(compressed, permuted.t(), alg_id=algorithm, transpose_result=True)
        return y[: x.shape[0]]

    return call


def _semi_structured(layer: Layer) -> Call:
    """PyTorch's own CUTLASS path (sm_80), after our permutation kernel."""
    from torch.sparse import SparseSemiStructuredTensorCUTLASS

    dense, places = permuted_dense(layer)
    # Not to_sparse_semi_structured, which takes cuSPARSELt wherever it is.
    weight = SparseSemiStructuredTensorCUTLASS.from_dense(dense)
    return lambda x: torch.nn.functional.linear(torch.ops.permllm.permute_inputs(x, places), weight)


CONTESTANTS: dict[str, Callable[[Layer], Call]] = {
    OURS: _ours,
    UNPERMUTED: lambda layer: _ours(layer, permuted=False),
    PASS: _after_pass,
    INT8: _ours,
    DENSE: _dense,
    "permute + cusparselt": _cusparselt,
    "permute + pytorch cutlass": _semi_structured,
}
