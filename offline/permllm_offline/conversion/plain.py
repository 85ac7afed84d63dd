"""A plain Hugging Face checkpoint whose weights are zero where they were pruned."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.tensors import StoredTensors


class PlainWeights:
    """Every weight that is not zero was kept; a negative zero is a zero.

    Those of 8 bits in a ``form`` are read as ``dtype``.
    """

    description = "a dense checkpoint with zeros"

    def __init__(
        self,
        directory: Path,
        experts_under: str | None,
        form: ScaledForm | None,
        dtype: torch.dtype,
    ) -> None:
        self._stored = StoredTensors(directory, experts_under=experts_under, form=form, dtype=dtype)

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
