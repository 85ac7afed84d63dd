"""Round the kept values of sparse layers to integers while their tensors pass to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.sparsity.grid import Grid, relative_error
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.int4_values import Int4Grid, choose_grid
from permllm_offline.sparsity.int8_values import Int8Grid, choose_scale, explained_rows
from permllm_offline.sparsity.rounded_layer import Rounding
from permllm_vllm.checkpoint import int4
from permllm_vllm.checkpoint.numbers import scale_problems
from permllm_vllm.checkpoint.schema import WEIGHT_PACKED, WEIGHT_SCALE

StoredScales = Callable[[str], Tensor | None]
"""Module -> float32 [out], or None."""


def no_scales(module: str) -> None:
    """Of values that have no scales yet."""


class IntegerRounding:
    """Rounds without data: every input counts alike, and pruned weights not at all.

    ``errors`` has, for each layer that has passed, the error of its weights relative to them, which
    is that of its output where inputs are uncorrelated and equally large.

    Args:
        values: to what.
        stored: module -> the scales of its rows, where its values were integers before: rows that
            have not moved since are rounded to the same integers.
    """

    def __init__(
        self,
        values: Rounding = "int8",
        stored: StoredScales = no_scales,
    ) -> None:
        self.values = values
        self.error_of = "weights"
        self._stored = stored
        self.errors: dict[str, float] = {}
        self._rows = self._kept_rows = 0

    @property
    def how(self) -> str:
        """Say how all values were rounded that have passed."""
        return f"without calibration data: {self._origin_of_scales}"

    @property
    def _origin_of_scales(self) -> str:
        chosen = "row is that of least squares of its weights alone"
        if not self._kept_rows:
            return f"the scale of each {chosen}"
        kept = "stored as integers with one scale, which stay what they are"
        if self._kept_rows == self._rows:
            return f"every row was {kept}"
        share = f"{self._kept_rows} of {self._rows}"
        return f"{share} rows were {kept}; the scale of any other {chosen}"

    def rounded(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a checkpoint, kept values as integers and followed by their scales.

        Rows are rounded where they stand, in whatever order a fold has left them.

        Raises:
            OfflineError: a row of so large or small values that float32 has no scale for it.
        """
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            if kind != WEIGHT_PACKED:
                yield name, tensor
                continue
            grid = self._grid(module, tensor)
            parts = [
                grid.stored(grid.integers(tensor[rows], rows=rows), rows=rows)
                for rows in row_chunks(tensor.shape)
            ]
            del tensor  # what is yielded is written, or copied, while this waits
            for kind in tuple(parts[0]):
                yield f"{module}.{kind}", torch.cat([part.pop(kind) for part in parts])
            yield f"{module}.{WEIGHT_SCALE}", grid.scale

    def _grid(self, module: str, values: Tensor) -> Grid:
        energy = torch.ones(values.shape[1])
        choose = _int4_grid if self.values == "int4" else _int8_grid
        grid, kept = choose(values, energy, self._stored(module))
        if kept is not None:
            self._kept_rows += int(kept.sum())
        self._rows += len(grid.scale)
        check_scale(module, grid.scale, self.values)
        self.errors[module] = relative_error(values, energy, grid, kept)
        return grid


def check_scale(module: str, scale: Tensor, values: Rounding) -> None:
    """Raise OfflineError where the values of a row were too large or small for a scale: [out]."""
    if scale_problems(f"{module}.{WEIGHT_SCALE}", scale):
        raise OfflineError(
            f"{module} has a row of values that are too large or too small for a scale in "
            f"float32: leave out --values {values}."
        )


def _int8_grid(weight: Tensor, energy: Tensor, stored: Tensor | None) -> tuple[Grid, Tensor | None]:
    """The grid of a layer, and which of its rows have stored scales and stay what they are."""
    scale = choose_scale(weight, energy)
    if stored is None:
        return Int8Grid(scale), None
    kept = explained_rows(weight, stored)
    return Int8Grid(torch.where(kept, stored, scale)), kept


def _int4_grid(weight: Tensor, energy: Tensor, stored: Tensor | None) -> tuple[Grid, Tensor | None]:
    """The same of int4 values, whose stored integers are their own multiples of 1."""
    grid = choose_grid(weight, energy, int4.KEPT)
    if stored is None:
        return grid, None
    kept = explained_rows(weight, stored, int4.SMALLEST, int4.LARGEST)
    scale = torch.where(kept, stored, grid.scale)
    return Int4Grid(scale, grid.multipliers.masked_fill(kept[:, None], 1), int4.KEPT), kept
