"""What a sparse checkpoint of another tool is to a conversion: weights, and which were kept."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from permllm_offline.model.plain_tensors import PlainTensors


class WeightSource(PlainTensors, Protocol):
    """A checkpoint seen as a plain one, and which of its weights were kept."""

    description: str

    def kept(self, name: str) -> Tensor:
        """Which weights of a matrix are stored, or not zero: bool, of the same shape."""
        ...

    def row_scales(self, name: str) -> Tensor | None:
        """The scales of the rows of a matrix that is stored in int8: float32 [out].

        None where a row has several, and of anything else, known names or not.
        """
        ...
