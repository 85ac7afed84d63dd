"""Which output rows of a linear feed the tensor that a fold permutes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_offline.model.heads import Heads

Rows = Callable[[int, Heads], Tensor]
"""(out_features, heads) -> int64 [rows of the part], in the order of the channels they feed."""


@dataclass(frozen=True)
class RowPart:
    """Rows of a linear of the same decoder layer: all of them, or one part of a fused linear.

    Channels are ``proportional`` to the rows that feed them where no activation function or norm
    lies between: `up` and `v`, not `gate`.
    """

    linear: str
    rows: Rows
    proportional: bool = False


def every_row(out_features: int, heads: Heads) -> Tensor:
    """The linear stands alone."""
    return torch.arange(out_features)


def first_half(out_features: int, heads: Heads) -> Tensor:
    """Gate of a fused gate and up."""
    return torch.arange(out_features // 2)


def second_half(out_features: int, heads: Heads) -> Tensor:
    """Up of a fused gate and up."""
    return torch.arange(out_features // 2, out_features)


def values_last(out_features: int, heads: Heads) -> Tensor:
    """Value of a fused query, key and value, one after the other."""
    return torch.arange(out_features - heads.key_value * heads.size, out_features)


def values_of_each_head(out_features: int, heads: Heads) -> Tensor:
    """Value of a fused query, key and value stored head by head: [head, 3, head_dim]."""
    return torch.arange(out_features).reshape(heads.query, 3, heads.size)[:, 2].flatten()
