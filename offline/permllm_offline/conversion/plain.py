"""A plain Hugging Face checkpoint whose weights are zero where they were pruned."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.tensors import StoredTensors


class PlainWeights:
    """Every weight that is not zero was kept; a negative zero is a zero."""

    description = "a dense checkpoint with zeros"
    config_updates: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, directory: Path, experts_under: str | None) -> None:
        self._stored = StoredTensors(directory, experts_under=experts_under)

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
