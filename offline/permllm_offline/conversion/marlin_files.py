"""A checkpoint of `marlin-24` seen as one of int8 weights with their zeros, and scales beside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from permllm_offline.conversion.marlin import (
    TILE_ROWS,
    mask_of,
    unpack_places,
    unpack_scales,
    unpack_tiles,
)
from permllm_offline.conversion.matrix_parts import require_parts
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader, natural_order
from permllm_vllm.checkpoint.scaled_form import MARLIN
from permllm_vllm.checkpoint.stored_files import TensorParts

_INTEGERS, _SCALES, _PLACES = "weight_packed", "scale_packed", "meta"
_DTYPES = {_INTEGERS: "int32", _SCALES: "float16", _PLACES: "int16"}
_WEIGHT, _SCALE = "weight", "weight_scale"


class MarlinFiles:
    """The matrices of such a checkpoint under the names of `int-quantized`, unpacked when read.

    The last one that was read is kept, so that its rows can be read in parts. Raises
    `CheckpointError` where one of the three tensors of a matrix is missing, or they do not fit.
    """

    description = f"compressed-tensors {MARLIN}"

    def __init__(self, files: TensorParts) -> None:
        self.directory = files.directory
        self._files = files
        stored = frozenset(files.names())
        parts = [name.rpartition(".") for name in stored]
        modules = {module for module, _, kind in parts if kind in (_INTEGERS, _SCALES)}
        self._headers: dict[str, TensorHeader] = {}
        for module in natural_order(modules):
            require_parts(stored, module, "packed", _DTYPES, [_WEIGHT, _SCALE])
            self._headers |= self._dense_headers(module)
        self._others = stored - {f"{module}.{kind}" for module in modules for kind in _DTYPES}
        self._unpacked: tuple[str, Tensor] | None = None

    def names(self) -> list[str]:
        """Names of all tensors as a dense checkpoint of int8 weights has them."""
        return [*self._headers, *self._others]

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor."""
        return self._headers[name] if name in self._headers else self._files.header(name)

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a tensor: so many of its elements as they lie, the first is `start`."""
        if name not in self._headers:
            return self._files.part(name, start, shape)
        module, _, kind = name.rpartition(".")
        tensor = self._weight(module) if kind == _WEIGHT else self._scale(module)
        return tensor.flatten()[start : start + math.prod(shape)].view(tuple(shape))

    def is_sparse(self, name: str) -> bool:
        """Whether a tensor is stored without its zeros."""
        return name.endswith(f".{_WEIGHT}") and name in self._headers

    def kept(self, name: str) -> Tensor:
        """Which weights of a sparse tensor are stored, explicit zeros among them."""
        return self._mask(name.rpartition(".")[0])

    def _weight(self, module: str) -> Tensor:
        if self._unpacked is None or self._unpacked[0] != module:
            rows, columns = self._headers[f"{module}.{_WEIGHT}"].shape
            packed = self._whole(f"{module}.{_INTEGERS}")
            integers = unpack_tiles(packed, packed.numel() * 64 // (rows * columns))
            dense = torch.zeros(rows, columns, dtype=torch.int8)
            self._unpacked = module, dense.masked_scatter_(self._mask(module), integers)
        return self._unpacked[1]

    def _mask(self, module: str) -> Tensor:
        places = unpack_places(self._whole(f"{module}.{_PLACES}"))
        if not bool((places[:, 1::2] > places[:, ::2]).all()):
            value, rule = "a group of 4 with one place twice", "two places, the lower one first"
            raise Problem(f"{module}.{_PLACES}", value, rule, FETCH_AGAIN).as_error()
        return mask_of(places)

    def _scale(self, module: str) -> Tensor:
        columns = self._headers[f"{module}.{_WEIGHT}"].shape[1]
        return unpack_scales(self._whole(f"{module}.{_SCALES}"), columns)

    def _whole(self, name: str) -> Tensor:
        return self._files.part(name, 0, self._files.header(name).shape)

    def _dense_headers(self, module: str) -> dict[str, TensorHeader]:
        """What the three tensors of a matrix stand for."""
        found: dict[str, TensorHeader] = {}
        for kind, dtype in _DTYPES.items():
            name = f"{module}.{kind}"
            found[kind] = self._files.header(name)
            if found[kind].dtype != dtype or len(found[kind].shape) != 2:
                value = f"{found[kind].dtype} of shape {list(found[kind].shape)}"
                raise Problem(name, value, f"{dtype}, two dimensions", FETCH_AGAIN).as_error()
        (groups, rows), columns = found[_SCALES].shape, found[_PLACES].shape[0] * 32
        expected = {
            _PLACES: [(columns // 32, rows * 2)],
            _INTEGERS: [(columns // 32, rows * 16 * bits // 32) for bits in (4, 8)],
        }
        for kind, shapes in expected.items():
            if rows < 1 or rows % TILE_ROWS or columns < 1 or found[kind].shape not in shapes:
                value = f"shape {list(found[kind].shape)}"
                rule = (
                    f"{' or '.join(str(list(shape)) for shape in shapes)}, for {rows} rows, which "
                    f"are a multiple of {TILE_ROWS}, of {columns} channels"
                )
                raise Problem(f"{module}.{kind}", value, rule, FETCH_AGAIN).as_error()
        return {
            f"{module}.{_WEIGHT}": TensorHeader((rows, columns), "int8"),
            f"{module}.{_SCALE}": TensorHeader((rows, groups), "float16"),
        }
