"""A plain Hugging Face checkpoint whose weights are zero where they were pruned."""

from __future__ import annotations

from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.tensors import StoredTensors


class PlainWeights:
    """Every weight that is not zero was kept; a negative zero is a zero."""

    description = "a dense checkpoint with zeros"

    def __init__(self, stored: StoredTensors) -> None:
        self._stored = stored

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return self._stored.names()

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor."""
        return self._stored.header(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor."""
        return self._stored.tensor(name)

    def kept(self, name: str) -> Tensor:
        """Which weights are not zero."""
        return self._stored.tensor(name) != 0
