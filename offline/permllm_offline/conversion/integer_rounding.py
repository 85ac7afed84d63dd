"""Round the kept values of sparse layers to integers while their tensors pass to a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.sparsity.grid import Grid, relative_error
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.int4_values import choose_grid
from permllm_offline.sparsity.int8_values import Int8Grid, choose_scale
from permllm_offline.sparsity.rounded_layer import Rounding
from permllm_vllm.checkpoint import int4
from permllm_vllm.checkpoint.numbers import scale_problems
from permllm_vllm.checkpoint.schema import WEIGHT_PACKED, WEIGHT_SCALE


class IntegerRounding:
    """Rounds without data: every input counts alike, and pruned weights not at all.

    ``errors`` has, for each layer that has passed, the error of its weights relative to them, which
    is that of its output where inputs are uncorrelated and equally large.
    """

    how = (
        "without calibration data: the scale of each row is that of least squares of its weights "
        "alone"
    )
    error_of = "weights"

    def __init__(self, values: Rounding) -> None:
        self.values = values
        self.errors: dict[str, float] = {}

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
        grid: Grid
        if self.values == "int4":
            grid = choose_grid(values, energy, int4.KEPT)
        else:
            grid = Int8Grid(choose_scale(values, energy))
        check_scale(module, grid.scale, self.values)
        self.errors[module] = relative_error(values, energy, grid)
        return grid


def check_scale(module: str, scale: Tensor, values: Rounding) -> None:
    """Raise OfflineError where the values of a row were too large or small for a scale: [out]."""
    if scale_problems(f"{module}.{WEIGHT_SCALE}", scale):
        raise OfflineError(
            f"{module} has a row of values that are too large or too small for a scale in "
            f"float32: leave out --values {values}."
        )
