"""How many bytes the checkpoint format takes for a sparse linear."""

from __future__ import annotations

import math

from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import (
    INPUT_PERMUTATION,
    WEIGHT_MASK,
    tensor_dtype,
    tensor_shape,
    value_kinds,
)


def sparse_bytes(
    out_features: int, in_features: int, pattern: Pattern, value_dtype: str, *, permuted: bool
) -> int:
    """Bytes of the tensors that the format stores for one linear, its bias not counted."""
    kinds = [*value_kinds(value_dtype), WEIGHT_MASK]
    if permuted:
        kinds.append(INPUT_PERMUTATION)  # a folded one is as large
    return sum(
        tensor_bytes(kind, out_features, in_features, pattern, value_dtype) for kind in kinds
    )


def tensor_bytes(
    kind: str, out_features: int, in_features: int, pattern: Pattern, value_dtype: str
) -> int:
    """Bytes of a tensor of a sparse linear, of a kind that has one dtype."""
    dtype = tensor_dtype(kind, value_dtype)
    assert dtype is not None
    shape = tensor_shape(kind, out_features, in_features, pattern, value_dtype)
    return math.prod(shape) * dtype.itemsize
