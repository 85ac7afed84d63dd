"""A checkpoint that stores its sparse weights without their zeros."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from permllm_offline.conversion.plain import PlainWeights
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_tensors import ScaledTensors
from permllm_vllm.checkpoint.stored_files import TensorParts


class SparseFiles(TensorParts, Protocol):
    """The tensors of such a checkpoint, under the names and in the shapes of one with zeros."""

    description: str

    def is_sparse(self, name: str) -> bool:
        """Whether a tensor is stored without its zeros."""
        ...

    def kept(self, name: str) -> Tensor:
        """Which weights of a sparse tensor are stored: bool, of its shape."""
        ...


class WeightsWithoutZeros(PlainWeights):
    """Weights as a plain checkpoint has them; those that are stored were kept, zeros among them.

    Weights that are stored in 8 bits, which `form` tells, become `dtype`.
    """

    def __init__(
        self,
        files: SparseFiles,
        form: ScaledForm | None,
        dtype: torch.dtype,
        experts_under: str | None = None,
    ) -> None:
        opened = files if form is None else ScaledTensors(files, form, dtype)
        super().__init__(opened, experts_under)
        self.description = files.description
        self._sparse = files

    def kept(self, name: str) -> Tensor:
        """Which weights are stored; of a tensor with its zeros, which are not zero."""
        return self._sparse.kept(name) if self._sparse.is_sparse(name) else super().kept(name)
