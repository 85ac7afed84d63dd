"""Weights of 8 bits whose blocks have scales, and the numbers that they stand for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """How many rows and columns of a matrix share a scale; None is all of them."""

    rows: int | None
    columns: int | None

    def grid(self, rows: int, columns: int) -> tuple[int, int]:
        """How many blocks cover a matrix: those at its edges may be smaller."""
        return -(-rows // (self.rows or rows or 1)), -(-columns // (self.columns or columns or 1))


def dequantize(
    weight: Tensor,
    scale: Tensor,
    block: Block,
    dtype: torch.dtype = torch.bfloat16,
    first_row: int = 0,
) -> Tensor:
    """Multiply rows of a matrix by the scales of their blocks, in float32, and round once.

    Args:
        weight: float8 or int8 [rows, in], of a matrix that may have more rows.
        scale: floating [blocks of rows, blocks of columns] of the whole matrix.
        block: what shares a scale.
        dtype: of the result.
        first_row: where in the matrix the rows begin.

    Returns:
        [rows, in].
    """
    rows, columns = weight.shape
    factors = scale
    if block.rows is not None:
        factors = factors[torch.arange(first_row, first_row + rows) // block.rows]
    factors = factors.float()
    if block.columns is not None:
        factors = factors[:, torch.arange(columns) // block.columns]
    return weight.float().mul_(factors).to(dtype)
