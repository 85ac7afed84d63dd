"""The tensors of a checkpoint directory by name, read when they are asked for."""

from __future__ import annotations

from torch import Tensor

from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.stored_files import TensorParts, not_there
from permllm_vllm.checkpoint.stored_otherwise import FROM_BEFORE

_SMALL_FLOATS = ("float8_", "F8_", "F6_", "F4")
"""What the names of dtypes begin with that stand for nothing without a scale."""
_SMALL_WHOLE = ("int8", "uint8")


class StoredTensors:
    """What an opened checkpoint directory holds, whatever it means.

    Raises `CheckpointError` for weights of 8 bits.
    """

    def __init__(self, files: TensorParts) -> None:
        self.directory = files.directory
        self._files = files
        self._names = frozenset(files.names())

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def names(self) -> list[str]:
        """List the tensors, layer 2 before layer 10."""
        return natural_order(self._names)

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor without reading it."""
        if name not in self._names:
            raise not_there(name, self.directory).as_error()
        header = self._files.header(name)
        require_meaning(name, header)
        return header

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raises `CheckpointError` when it is not there."""
        return self._files.part(name, 0, self.header(name).shape)


def require_meaning(name: str, header: TensorHeader) -> None:
    """Raise `CheckpointError` for a tensor of 8 bits that stands for nothing without a scale.

    Whole numbers may be anything but a weight.
    """
    is_weight = name.endswith((".weight", ".gate_up_proj", ".down_proj"))
    small = (*_SMALL_FLOATS, *_SMALL_WHOLE) if is_weight else _SMALL_FLOATS
    if header.dtype.startswith(small):
        rule = "weights of 16 or 32 bits, or by config.json those of a method that is read"
        raise Problem(name, header.dtype, rule, FROM_BEFORE).as_error()
