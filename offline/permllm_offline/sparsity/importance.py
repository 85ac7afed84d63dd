"""Importance: a score for every weight of a linear layer; the mask keeps the highest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError

CHUNK_ELEMENTS = 1 << 18
"""Elements of a matrix that are scored, compared and summed at once."""

ALIGNED_COLUMNS = 64
"""Columns are summed in multiples of these, so that each is added up in the same order as in one
sum over the whole matrix: these many vectors make one step of torch's reduction."""


class Scores(Protocol):
    """Float32 [out_features, in_features], of which parts are asked for: a tensor is one."""

    @property
    def shape(self) -> torch.Size:
        """Of the whole matrix."""

    def __getitem__(self, part: slice | tuple[slice, slice], /) -> Tensor:
        """Rows, or rows and columns."""


@dataclass(frozen=True)
class WeightScores:
    """Importance of a weight [out_features, in_features], computed where it is asked for.

    A parameter stays one whose memory may be laid out anew in the meantime.

    ``score(size, rows, columns)`` takes the absolute values of a part, float32, which it may
    overwrite, and which part it is.
    """

    weight: Tensor
    score: Callable[[Tensor, slice, slice], Tensor]

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return self.weight.shape

    def __getitem__(self, part: slice | tuple[slice, slice], /) -> Tensor:
        """Scores of rows, or of rows and columns: float32."""
        rows, columns = part if isinstance(part, tuple) else (part, slice(None))
        sizes = torch.abs(self.weight.detach()[rows, columns])
        return self.score(sizes.float(), rows, columns)


def row_chunks(shape: torch.Size) -> Iterator[slice]:
    """Cut the rows of a matrix into parts of about ``CHUNK_ELEMENTS``."""
    rows, columns = shape
    count = max(1, CHUNK_ELEMENTS // columns)
    return (slice(first, min(first + count, rows)) for first in range(0, rows, count))


def column_sums(scores: Scores) -> Tensor:
    """Sum over the rows: float32 [in_features], to the bit what ``sum(0)`` of a tensor is."""
    rows, columns = scores.shape
    count = max(1, CHUNK_ELEMENTS // (rows * ALIGNED_COLUMNS)) * ALIGNED_COLUMNS
    parts = [slice(first, first + count) for first in range(0, columns, count)]
    return torch.cat([scores[:, part].sum(0) for part in parts])


def row_sums(scores: Scores) -> Tensor:
    """Sum over the columns: float32 [out_features], to the bit what ``sum(1)`` of a tensor is."""
    return torch.cat([scores[rows].sum(1) for rows in row_chunks(scores.shape)])


def not_finite(linear: str) -> OfflineError:
    """What is to be raised of a linear whose importance is NaN or infinite."""
    return OfflineError(
        f"the importance of {linear} is not finite: the model's weights or its activations "
        "overflow. Try --dtype float32, and check the model with `permllm-offline eval`."
    )


def mean_score(scores: Scores) -> Tensor:
    """Mean of all: float32 scalar, to the bit what ``mean()`` of a tensor is."""
    whole = torch.empty(scores.shape, dtype=scores[:1].dtype, device=scores[:1].device)
    for rows in row_chunks(scores.shape):
        whole[rows] = scores[rows]
    return whole.mean()


def magnitude(weight: Tensor, activation_norm: Tensor | None) -> WeightScores:
    """Score a weight by its absolute value.

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: unused.
    """
    del activation_norm
    return WeightScores(weight, lambda size, rows, columns: size)


def wanda(weight: Tensor, activation_norm: Tensor | None) -> WeightScores:
    """Score a weight by ``|W| * ||X||_2`` of its input channel (arXiv 2306.11695, Eq. 1).

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: [in_features] on any device, the norm of each input channel over the
            calibration tokens; a common factor changes nothing, since a mask compares within a row.
    """
    if activation_norm is None:
        raise ValueError("wanda needs the activation norms of the calibration forward pass")
    norm = activation_norm.to(weight.device).float()
    return WeightScores(weight, lambda size, rows, columns: size.mul_(norm[columns]))


RIA_EXPONENT = 0.5
"""Of the activation norm: the constant ``a`` of RIA."""


def ria(weight: Tensor, activation_norm: Tensor | None) -> WeightScores:
    """Score a weight by its shares of its column and its row, times a root of its input's norm.

    ``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2^a`` with a = 0.5: relative
    importance and activations (RIA, ICLR 2024, Eq. 4).

    Args:
        weight: [out_features, in_features], any floating dtype.
        activation_norm: [in_features], as for ``wanda``.
    """
    if activation_norm is None:
        raise ValueError("ria needs the activation norms of the calibration forward pass")
    sizes, smallest = magnitude(weight, None), torch.finfo(torch.float32).tiny
    column = column_sums(sizes).clamp_min(smallest)
    row = row_sums(sizes).clamp_min(smallest)[:, None]
    root = activation_norm.to(weight.device).float() ** RIA_EXPONENT

    def score(size: Tensor, rows: slice, columns: slice) -> Tensor:
        return (size / column[columns] + size / row[rows]) * root[columns]

    return WeightScores(weight, score)


@dataclass(frozen=True)
class Importance:
    """An entry of the table: the score, and whether it reads calibration activations."""

    score: Callable[[Tensor, Tensor | None], WeightScores]
    needs_activations: bool


IMPORTANCES: Mapping[str, Importance] = {
    "magnitude": Importance(magnitude, needs_activations=False),
    "wanda": Importance(wanda, needs_activations=True),
    "ria": Importance(ria, needs_activations=True),
}
