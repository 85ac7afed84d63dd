"""Tensors under the names that a plain Hugging Face checkpoint of a model has for them."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader


class PlainTensors(Protocol):
    """A checkpoint seen as a plain one: names, shapes and tensors of a Hugging Face model."""

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        ...

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor, which is not read."""
        ...

    def tensor(self, name: str) -> Tensor:
        """The dense tensor."""
        ...
