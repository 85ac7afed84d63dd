"""The tensors of a checkpoint directory by name, read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.fused_experts import Part, is_fused, parts_of
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.stored_files import TensorParts, not_there
from permllm_vllm.checkpoint.stored_otherwise import FROM_BEFORE

_SMALL_FLOATS = ("float8_", "F8_", "F6_", "F4")
"""What the names of dtypes begin with that stand for nothing without a scale."""
_SMALL_WHOLE = ("int8", "uint8")


class StoredTensors:
    """What an opened checkpoint directory holds, whatever it means.

    Fused experts whose names begin with `experts_under` are seen as separate ones. Raises
    `CheckpointError` for experts that are stored both ways, and for weights of 8 bits.
    """

    def __init__(self, files: TensorParts, *, experts_under: str | None = None) -> None:
        self.directory = files.directory
        self._files = files
        self._parts: dict[str, Part | None] = dict.fromkeys(files.names())
        if experts_under is not None:
            self._separate(name for name in self._parts if name.startswith(experts_under))

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def names(self) -> list[str]:
        """List the tensors, layer 2 before layer 10."""
        return natural_order(self._parts)

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor without reading it."""
        if name not in self._parts:
            raise not_there(name, self.directory).as_error()
        part = self._parts[name]
        stored = name if part is None else part.tensor
        header = self._files.header(stored)
        require_meaning(stored, header)
        return header if part is None else header._replace(shape=part.shape)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor; raises `CheckpointError` when it is not there."""
        shape = self.header(name).shape
        part = self._parts[name]
        return self._files.part(name, 0, shape) if part is None else self._files.part(*part)

    def _separate(self, names: Iterable[str]) -> None:
        """Put the matrices of fused experts in their place."""
        for fused in [name for name in names if is_fused(name)]:
            parts = dict(parts_of(fused, self.header(fused).shape))
            for name in parts:
                if name in self._parts:
                    value, rule = f"also a part of {fused}", "every tensor is stored once"
                    raise Problem(name, value, rule, FETCH_AGAIN).as_error()
            if parts:
                del self._parts[fused]
                self._parts |= parts


def require_meaning(name: str, header: TensorHeader) -> None:
    """Raise `CheckpointError` for a tensor of 8 bits that stands for nothing without a scale.

    Whole numbers may be anything but a weight.
    """
    is_weight = name.endswith(".weight") or is_fused(name)
    small = (*_SMALL_FLOATS, *_SMALL_WHOLE) if is_weight else _SMALL_FLOATS
    if header.dtype.startswith(small):
        rule = "weights of 16 or 32 bits, or by config.json those of a method that is read"
        raise Problem(name, header.dtype, rule, FROM_BEFORE).as_error()
