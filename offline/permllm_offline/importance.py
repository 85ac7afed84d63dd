"""Importance: a score for every weight of a linear layer; the mask keeps the highest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


def magnitude(weight: Tensor, activation_norm: Tensor | None) -> Tensor:
    """Score a weight by its absolute value.

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: unused.

    Returns:
        float32 [out_features, in_features].
    """
    del activation_norm
    return weight.float().abs()


def wanda(weight: Tensor, activation_norm: Tensor | None) -> Tensor:
    """Score a weight by ``|W| * ||X||_2`` of its input channel (arXiv 2306.11695, Eq. 1).

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: [in_features] on any device, the norm of each input channel over the
            calibration tokens; a common factor changes nothing, since a mask compares within a row.

    Returns:
        float32 [out_features, in_features].
    """
    if activation_norm is None:
        raise ValueError("wanda needs the activation norms of the calibration forward pass")
    return weight.float().abs() * activation_norm.to(weight.device).float()


RIA_EXPONENT = 0.5
"""Of the activation norm: the constant ``a`` of RIA."""


def ria(weight: Tensor, activation_norm: Tensor | None) -> Tensor:
    """Score a weight by its shares of its column and its row, times a root of its input's norm.

    ``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a`` with a = 0.5: relative
    importance and activations (RIA, ICLR 2024, Eq. 4).

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: [in_features], as for ``wanda``.

    Returns:
        float32 [out_features, in_features].
    """
    if activation_norm is None:
        raise ValueError("ria needs the activation norms of the calibration forward pass")
    size = weight.float().abs()
    smallest = torch.finfo(size.dtype).tiny
    column = size.sum(0, keepdim=True).clamp_min(smallest)
    row = size.sum(1, keepdim=True).clamp_min(smallest)
    norm = activation_norm.to(weight.device).float()
    return (size / column + size / row) * norm**RIA_EXPONENT


@dataclass(frozen=True)
class Importance:
    """An entry of the table: the score, and whether it reads calibration activations."""

    score: Callable[[Tensor, Tensor | None], Tensor]
    needs_activations: bool


IMPORTANCES: Mapping[str, Importance] = {
    "magnitude": Importance(magnitude, needs_activations=False),
    "wanda": Importance(wanda, needs_activations=True),
    "ria": Importance(ria, needs_activations=True),
}
