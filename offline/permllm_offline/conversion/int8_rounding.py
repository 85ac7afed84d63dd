"""Round the kept values of sparse layers to int8 while their tensors pass on the way to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.int8_values import (
    choose_scale,
    explained_rows,
    relative_error,
    round_to_int8,
)
from permllm_vllm.checkpoint.numbers import scale_problems
from permllm_vllm.checkpoint.schema import WEIGHT_PACKED, WEIGHT_SCALE

Judged = Callable[[str, Tensor], tuple[Tensor, Tensor]]
"""Module and kept values -> the weight whose error counts, and the energy of its inputs."""
StoredScales = Callable[[str], Tensor | None]
"""Module -> float32 [out], or None."""


def no_scales(module: str) -> None:
    """Of values that have no scales yet."""


def without_data(module: str, values: Tensor) -> tuple[Tensor, Tensor]:
    """Every input counts alike, and pruned weights not at all."""
    return values, torch.ones(values.shape[1])


class Int8Rounding:
    """Rounds without data, unless ``judged`` knows inputs.

    ``errors`` has, for each layer that has passed, the error of its weights relative to them, which
    is that of its output where inputs are uncorrelated and equally large.

    Args:
        judged: what an error counts.
        stored: module -> the scales of its rows, where its values were int8 before: rows that have
            not moved since are rounded to the same integers.
    """

    def __init__(self, judged: Judged = without_data, stored: StoredScales = no_scales) -> None:
        self._judged, self._stored = judged, stored
        self.errors: dict[str, float] = {}
        self._rows = self._kept_rows = 0

    @property
    def origin_of_scales(self) -> str:
        """Say where the scales of all rows come from that have passed."""
        chosen = "row is that of least squares of its weights alone"
        if not self._kept_rows:
            return f"the scale of each {chosen}"
        kept = "stored as integers with one scale, which stay what they are"
        if self._kept_rows == self._rows:
            return f"every row was {kept}"
        share = f"{self._kept_rows} of {self._rows}"
        return f"{share} rows were {kept}; the scale of any other {chosen}"

    @property
    def description(self) -> str:
        """Say how all values were rounded that have passed."""
        return f"int8, without calibration data: {self.origin_of_scales}"

    def rounded(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a checkpoint, those of kept values as int8 and followed by scales.

        Rows are rounded where they stand, in whatever order a fold has left them.

        Raises:
            OfflineError: a row of so large or small values that float32 has no scale for it.
        """
        for name, tensor in tensors:
            module, _, kind = name.rpartition(".")
            if kind != WEIGHT_PACKED:
                yield name, tensor
                continue
            scale = self._scale(module, tensor)
            parts = [round_to_int8(tensor[rows], scale[rows]) for rows in row_chunks(tensor.shape)]
            del tensor  # what is yielded is written, or copied, while this waits
            yield name, torch.cat(parts)
            parts.clear()
            yield f"{module}.{WEIGHT_SCALE}", scale

    def _scale(self, module: str, values: Tensor) -> Tensor:
        weight, energy = self._judged(module, values)
        scale, stored, kept = choose_scale(weight, energy), self._stored(module), None
        if stored is not None:
            kept = explained_rows(weight, stored)
            scale = torch.where(kept, stored, scale)
            self._kept_rows += int(kept.sum())
        self._rows += len(scale)
        if scale_problems(f"{module}.{WEIGHT_SCALE}", scale):
            raise OfflineError(
                f"{module} has a row of values that are too large or too small for a scale in "
                "float32: leave out --values int8."
            )
        self.errors[module] = relative_error(weight, energy, scale, kept)
        return scale
