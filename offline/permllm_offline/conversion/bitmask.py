"""compressed-tensors `sparse-24-bitmask`, which vLLM and llm-compressor read until 2026.

For a linear `L` of `out` rows and `in` channels: `L.compressed` [out, in / 2], the kept values of
every row in ascending channel; `L.bitmask` uint8 [out, in / 8], bit `j % 8` (least significant
first) of byte `j / 8` set where channel `j` is kept; `L.shape`, the two sizes.
"""

from __future__ import annotations

import math
from collections.abc import Container, Sequence

from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.packing import first_violation, unpack, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.stored_files import TensorParts

_COMPRESSED, _BITMASK, _SHAPE = "compressed", "bitmask", "shape"
_KINDS = (_COMPRESSED, _BITMASK, _SHAPE)
_WEIGHT = "weight"
_WHOLE = ("int64", "int32")
_PATTERN = Pattern(2, 4)


class BitmaskFiles:
    """The matrices of a bitmask checkpoint under their dense names, decompressed when asked for.

    Raises `CheckpointError` where one of the three tensors is missing, they do not fit, or the
    matrix is there a second time as a dense one.
    """

    def __init__(self, files: TensorParts) -> None:
        self.directory = files.directory
        self._files = files
        stored = frozenset(files.names())
        parts = [name.rpartition(".") for name in stored]
        modules = {module for module, _, kind in parts if kind in (_COMPRESSED, _BITMASK)}
        self._headers: dict[str, TensorHeader] = {}
        for module in natural_order(modules):
            _require_parts(stored, module)
            self._headers[f"{module}.{_WEIGHT}"] = self._header(module)
        self._others = stored - {f"{module}.{kind}" for module in modules for kind in _KINDS}

    def names(self) -> list[str]:
        """Names of all tensors as a dense checkpoint has them."""
        return [*self._headers, *self._others]

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor."""
        return self._headers[name] if name in self._headers else self._files.header(name)

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read whole rows of a dense tensor, bit for bit, zeros elsewhere."""
        if not self.is_sparse(name):
            return self._files.part(name, start, shape)
        module, (_, columns) = name.removesuffix(".weight"), self.header(name).shape
        row, rows = start // columns, math.prod(shape) // columns
        values = self._files.part(f"{module}.{_COMPRESSED}", start // 2, (rows, columns // 2))
        mask = self._mask(module, row, rows, columns)
        return unpack(values, mask).view(tuple(shape))

    def is_sparse(self, name: str) -> bool:
        """Whether a tensor is stored without its zeros."""
        return name in self._headers

    def kept(self, name: str) -> Tensor:
        """Which weights of a sparse tensor are stored, explicit zeros among them.

        Raises `CheckpointError` for a mask that is not of 2:4, which this layout cannot be.
        """
        rows, columns = self.header(name).shape
        return unpack_mask(self._mask(name.removesuffix(".weight"), 0, rows, columns))

    def _header(self, module: str) -> TensorHeader:
        """What the three tensors of a matrix stand for."""
        sizes = self._sizes(module)
        headers = {kind: self._files.header(f"{module}.{kind}") for kind in (_COMPRESSED, _BITMASK)}
        for kind, columns in ((_COMPRESSED, sizes[1] // 2), (_BITMASK, sizes[1] // 8)):
            if headers[kind].shape != (sizes[0], columns):
                value = f"shape {list(headers[kind].shape)}"
                rule = f"{[sizes[0], columns]} for a matrix of {list(sizes)}"
                raise Problem(f"{module}.{kind}", value, rule, FETCH_AGAIN).as_error()
        if headers[_BITMASK].dtype != "uint8":
            rule = "uint8"
            raise Problem(
                f"{module}.{_BITMASK}", headers[_BITMASK].dtype, rule, FETCH_AGAIN
            ).as_error()
        return TensorHeader(sizes, headers[_COMPRESSED].dtype)

    def _mask(self, module: str, row: int, rows: int, columns: int) -> Tensor:
        each, name = columns // 8, f"{module}.{_BITMASK}"
        mask = self._files.part(name, row * each, (rows, each))
        if (violation := first_violation(mask, _PATTERN)) is not None:
            at, group, count = violation
            value, rule = f"{count} weights in group {group} of row {row + at}", f"{_PATTERN}"
            raise Problem(name, value, rule, FETCH_AGAIN).as_error()
        return mask

    def _sizes(self, module: str) -> tuple[int, int]:
        """What `shape` says, which is read only where it is as small as it must be."""
        name, rule = f"{module}.{_SHAPE}", "two whole numbers, the second a multiple of 8"
        header = self._files.header(name)
        if math.prod(header.shape) != 2 or header.dtype not in _WHOLE:
            value = f"{header.dtype} of shape {list(header.shape)}"
            raise Problem(name, value, rule, FETCH_AGAIN).as_error()
        found = self._files.part(name, 0, header.shape)
        rows, columns = map(int, found.flatten().tolist())
        if columns % 8 or min(rows, columns) < 1:
            raise Problem(name, str((rows, columns)), rule, FETCH_AGAIN).as_error()
        return rows, columns


def _require_parts(stored: Container[str], module: str) -> None:
    """Raise `CheckpointError` where one of a matrix's tensors is missing, or a dense one is too."""
    for kind in _KINDS:
        if f"{module}.{kind}" not in stored:
            rule = f"a compressed matrix has {', '.join(_KINDS)}"
            raise Problem(f"{module}.{kind}", "nothing", rule, FETCH_AGAIN).as_error()
    if f"{module}.{_WEIGHT}" in stored:
        value, rule = "a second, dense weight", f"it is in {', '.join(_KINDS)} alone"
        raise Problem(f"{module}.{_WEIGHT}", value, rule, FETCH_AGAIN).as_error()
