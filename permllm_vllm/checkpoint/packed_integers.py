"""compressed-tensors `pack-quantized`: integers of 4 or 8 bits, several in each int32.

For a linear `L` of `out` rows and `in` channels: `L.weight_packed` int32 [out, in * bits / 32], the
integers of a row without sign, the first in the lowest bits; `L.weight_shape`, the two sizes;
`L.weight_scale` as beside a weight of int8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.quantization_entries import FROM_BEFORE
from permllm_vllm.checkpoint.stored_files import TensorParts

_PACKED, _SHAPE, _WEIGHT = ".weight_packed", ".weight_shape", ".weight"


def unpack_integers(packed: Tensor, bits: int) -> Tensor:
    """Undo `weight_packed`: int32 [rows, words] -> int8 [rows, words * 32 / bits]."""
    integers = packed.contiguous().view(torch.uint8)
    if bits == 4:
        integers = torch.stack((integers & 15, integers >> 4), dim=-1).flatten(1)
    return (integers - (1 << (bits - 1))).view(torch.int8)


def unpacked_headers(headers: Mapping[str, TensorHeader], bits: int) -> dict[str, TensorHeader]:
    """Return the headers of the same checkpoint with weights of int8 in place of packed ones.

    Raises `CheckpointError` for a packed weight of another form, or beside one of int8.
    """
    found: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        module = name.removesuffix(_PACKED)
        if name == module:
            if name.removesuffix(_SHAPE) + _PACKED not in headers:
                found[name] = header
            continue
        if header.dtype != "int32" or len(header.shape) != 2:
            value, rule = f"{header.dtype} of shape {list(header.shape)}", "int32, a matrix"
            raise Problem(name, value, rule, FROM_BEFORE).as_error()
        if module + _WEIGHT in headers:
            value, rule = "a second, dense weight", f"the weight is in {name} alone"
            raise Problem(module + _WEIGHT, value, rule, FETCH_AGAIN).as_error()
        rows, words = header.shape
        found[module + _WEIGHT] = TensorHeader((rows, words * (32 // bits)), "int8")
    return found


class PackedFiles:
    """A checkpoint of packed integers seen as one of int8 weights.

    Raises `CheckpointError` where a packed weight is of another form, or of another shape than is
    said beside it.
    """

    def __init__(self, files: TensorParts, bits: int) -> None:
        self.directory = files.directory
        self._files, self._bits = files, bits
        stored = {name: files.header(name) for name in files.names()}
        self._headers = unpacked_headers(stored, bits)
        self._packed = self._headers.keys() - stored.keys()
        for name in self._packed:
            said = name.removesuffix(_WEIGHT) + _SHAPE
            if said in stored:
                self._check_shape(said, stored[said], self._headers[name])

    def names(self) -> Iterable[str]:
        """Names of all tensors."""
        return self._headers.keys()

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a tensor; raises `CheckpointError` when it is not there."""
        return self._headers[name] if name in self._headers else self._files.header(name)

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a tensor, of an unpacked one whole rows."""
        if name not in self._packed:
            return self._files.part(name, start, shape)
        columns, each = self._headers[name].shape[1], 32 // self._bits
        words = math.prod(shape) // columns, columns // each
        packed = self._files.part(name.removesuffix(_WEIGHT) + _PACKED, start // each, words)
        return unpack_integers(packed, self._bits).view(tuple(shape))

    def _check_shape(self, name: str, header: TensorHeader, weight: TensorHeader) -> None:
        """Compare what is said of a shape; rows that end inside an int32 are in no model."""
        rule = f"{list(weight.shape)}, what {self._bits} bits for each weight make"
        if math.prod(header.shape) != 2 or header.dtype not in ("int32", "int64"):
            value = f"{header.dtype} of shape {list(header.shape)}"
            raise Problem(name, value, rule, FROM_BEFORE).as_error()
        said = self._files.part(name, 0, header.shape).flatten().tolist()
        if said != list(weight.shape):
            raise Problem(name, str(said), rule, FROM_BEFORE).as_error()
