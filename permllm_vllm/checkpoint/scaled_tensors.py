"""Stored weights of 8 bits as the products with their scales, made when they are read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.packed_integers import PackedFiles
from permllm_vllm.checkpoint.scaled import dequantize
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_headers import dense_headers, scaled_rows, scales_of
from permllm_vllm.checkpoint.stored_files import StoredFiles, TensorParts, not_there

_CHUNK_ELEMENTS = 1 << 18
"""Read and multiplied at a time, so that nothing but the product takes the memory of a tensor."""
_WIDER = "read it as bfloat16 or float32: --dtype of prune and eval, dtype of config.json otherwise"


def open_parts(
    directory: str | PathLike[str], form: ScaledForm | None, dtype: torch.dtype
) -> TensorParts:
    """Open a checkpoint directory: weights that are stored in a form of 8 bits become `dtype`.

    Raises `CheckpointError` for files that are not whole, and weights that do not fit the form.
    """
    files: TensorParts = StoredFiles(directory)
    if form is not None and form.packed_bits is not None:
        files = PackedFiles(files, form.packed_bits)
    return files if form is None else ScaledTensors(files, form, dtype)


class ScaledTensors:
    """A checkpoint of weights of 8 bits under the names, shapes and dtypes of the dense model.

    Raises `CheckpointError` for weights and scales that do not belong together, before anything is
    read.
    """

    def __init__(self, files: TensorParts, form: ScaledForm, dtype: torch.dtype) -> None:
        stored = {name: files.header(name) for name in files.names()}
        self.directory = files.directory
        self._files, self._form, self._dtype = files, form, dtype
        self._scales = scales_of(stored, form)
        self._rows = {
            name: scaled_rows(name, stored[name].shape, stored[scale].shape)
            for name, scale in self._scales.items()
        }
        self._headers = dense_headers(stored, form, _name(dtype))

    def names(self) -> Iterable[str]:
        """Names of all tensors of the dense model."""
        return self._headers.keys()

    def header(self, name: str) -> TensorHeader:
        """Return shape and dtype of a dense tensor; raises `CheckpointError` for no such name."""
        if name not in self._headers:
            raise not_there(name, self.directory).as_error()
        return self._headers[name]

    def part(self, name: str, start: int, shape: Sequence[int]) -> Tensor:
        """Read a part of a dense tensor as `StoredFiles` does: of a product, whole rows.

        Raises `CheckpointError` for no such name, and where a weight, a scale or a product is no
        finite number.
        """
        header = self.header(name)
        if name not in self._scales:
            return self._files.part(name, start, shape)
        rows, columns = self._rows[name], header.shape[-1]
        product = torch.empty(tuple(shape), dtype=self._dtype)
        target = product.view(-1, columns)
        first, together = start // columns, max(1, _CHUNK_ELEMENTS // columns)
        for matrix, inside in _by_matrix(first, len(target), rows):
            scale = self._scale(name, matrix)
            for row in inside[::together]:
                count, at = min(together, inside.stop - row), matrix * rows + row
                weight = self._files.part(name, at * columns, (count, columns))
                target[at - first :][:count] = self._multiplied(name, weight, scale, row)
        return product

    def row_scales(self, name: str) -> Tensor | None:
        """Return the scales of the rows of an int8 matrix: float32 [out].

        None where a row has several, and of tensors that are no such matrix.
        """
        one_in_row = self._form.stored == "int8" and self._form.block.columns is None
        if name not in self._scales or not one_in_row:
            return None
        if len(shape := self._headers[name].shape) != 2:
            return None
        found, rows = self._scale(name, 0).float().flatten(), shape[0]
        return found.repeat_interleave(self._form.block.rows or rows)[:rows]

    def _scale(self, name: str, matrix: int) -> Tensor:
        """Read the scales of one matrix of a weight: [blocks of rows, blocks of columns]."""
        columns = self._headers[name].shape[-1]
        scale, grid = self._scales[name], self._form.block.grid(self._rows[name], columns)
        found = self._files.part(scale, matrix * math.prod(grid), grid)
        if not bool(found.isfinite().all()):
            value, rule = "nan or infinity", "every scale is a finite number"
            raise Problem(scale, value, rule, FETCH_AGAIN).as_error()
        return found

    def _multiplied(self, name: str, weight: Tensor, scale: Tensor, row: int) -> Tensor:
        product = dequantize(weight, scale, self._form.block, self._dtype, row)
        finite = product.isfinite().all(1)
        if bool(finite.all()):
            return product
        bad = int(finite.long().argmin())
        if bool(weight[bad].float().isnan().any()):
            value, rule = f"nan in row {row + bad}", "every weight is a number"
            raise Problem(name, value, rule, FETCH_AGAIN).as_error()
        value = f"a product beyond the range of {_name(self._dtype)} in row {row + bad}"
        # No weight is that large: a dtype of its range shows that its scale is damaged.
        narrow = self._dtype == torch.float16
        remedy = _WIDER if narrow else FETCH_AGAIN
        raise Problem(name, value, "the dtype asked for holds every weight", remedy).as_error()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _by_matrix(first: int, count: int, rows: int) -> Iterator[tuple[int, range]]:
    """Split rows of all matrices, one after the other, into the rows inside each."""
    end = first + count
    for matrix in range(first // rows, -(-end // rows)):
        begin = matrix * rows
        yield matrix, range(max(first - begin, 0), min(end - begin, rows))
