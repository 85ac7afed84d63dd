"""Where the weights of a linear layer may lie once they are rounded, and what that costs."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from permllm_offline.sparsity.importance import row_chunks


class Grid(Protocol):
    """Integers of int8, with a scale for each row; `rows` are some of them, or their numbers."""

    @property
    def scale(self) -> Tensor:
        """Of each row: float32 [out], finite and above 0."""
        ...

    def integers(self, weight: Tensor, *, rows: slice | Tensor = slice(None)) -> Tensor:
        """Round some rows of the weight to the nearest values: int8, to be scaled.

        Where inputs are smoothed, these are the values that meet the smoothed inputs.
        """
        ...

    def rounded(self, weight: Tensor, *, rows: slice | Tensor = slice(None)) -> Tensor:
        """The same as weights, float32."""
        ...

    def stored(self, integers: Tensor, *, rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """The tensors that hold those of the integers of some rows which are kept, by kind."""
        ...


def grouped(rows: Tensor, group: int) -> Tensor:
    """Cut rows into groups of columns: [rows, n] -> [rows, groups, group], zeros past the last."""
    return functional.pad(rows, (0, -rows.shape[1] % group)).unflatten(1, (-1, group))


def relative_error(weight: Tensor, channel_energy: Tensor, grid: Grid) -> float:
    """Return the expected root-mean-square error of the output, relative to the output.

    Args:
        weight: floating [out, in].
        channel_energy: float32 [in], mean square of each input channel.
        grid: to which the weight is rounded.
    """
    energy, outputs, errors = channel_energy.float(), [], []
    for rows in row_chunks(weight.shape):
        part = weight[rows].float()
        outputs.append(part.square() @ energy)
        errors.append((part - grid.rounded(part, rows=rows)).square_() @ energy)
    output, error = torch.cat(outputs).sum(), torch.cat(errors).sum()
    return float((error / output.clamp_min(1e-30)).sqrt())
