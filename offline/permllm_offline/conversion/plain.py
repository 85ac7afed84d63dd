"""A plain Hugging Face checkpoint whose weights are zero where they were pruned."""

from __future__ import annotations

from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled_tensors import ScaledTensors
from permllm_vllm.checkpoint.stored_files import TensorParts
from permllm_vllm.checkpoint.tensors import StoredTensors


class PlainWeights:
    """Every weight that is not zero was kept; a negative zero is a zero.

    Fused experts whose names begin with `experts_under` are seen as separate ones.
    """

    description = "a dense checkpoint with zeros"

    def __init__(self, files: TensorParts, experts_under: str | None = None) -> None:
        self._files = files
        self._stored = StoredTensors(files, experts_under=experts_under)

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

    def row_scales(self, name: str) -> Tensor | None:
        """The scales of the rows of a matrix that is stored in int8, where each row has one."""
        if isinstance(self._files, ScaledTensors):
            return self._files.row_scales(name)
        return None
