"""What a sparse checkpoint of another tool is to a conversion: weights, and which were kept."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader


class WeightSource(Protocol):
    """A checkpoint seen as a plain one: names, shapes and tensors of a Hugging Face model."""

    description: str

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        ...

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor, which is not read."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The dense tensor."""
        ...

    def kept(self, name: str) -> Tensor:
        """Which weights of a matrix are stored, or not zero: bool, of the same shape."""
        ...

    def row_scales(self, name: str) -> Tensor | None:
        """The scales of the rows of a matrix that is stored in int8: float32 [out].

        None where a row has several, and of anything else, known names or not.
        """
        ...
