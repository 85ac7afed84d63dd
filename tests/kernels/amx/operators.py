"""The operators of csrc/bindings.cpp for amx, on the emulated tile unit."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch
from torch import Tensor

from permllm_vllm import ops
from tests.kernels.amx.emulated import Emulation

ALIGNMENT = 64
DENSE8, MOST_DENSE8 = 4, 1 << 16
OUTPUTS, INPUTS, VALUES, STRAYS = range(3, 7)
"""Of csrc/cpu/packing/layout.h, the latter in a header."""


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class StackedLinear(ctypes.Structure):
    """That of csrc/cpu/experts/experts.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "headers", "gather", "scale")),
        *((name, ctypes.c_int64) for name in ("n", "k")),
    )


class EmulatedOperators:
    """`cpu_pack`, `sparse_linear` and `sparse_experts` of C++ packing, dispatch and kernels.

    Arguments are those of the operators, and right: nothing is checked. Threads are as many as
    torch has.
    """

    def __init__(self, emulation: Emulation) -> None:
        self.emulation = emulation
        self.library = emulation.library
        pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
        self.library.packs_int8.restype = flag
        self.library.packed_size.argtypes = [number] * 4
        self.library.packed_size.restype = number
        self.library.packed_type.argtypes = [number, pointer, number, number, pointer]
        self.library.packed_type.restype = number
        self.library.pack_weight.argtypes = [number, *[pointer] * 3, *[number] * 4, pointer]
        self.library.pack_weight.restype = number
        self.library.pack_dense_weight.argtypes = [pointer, number, number, pointer]
        self.library.pack_dense_weight.restype = None
        self.library.multiply_packed.argtypes = [
            number, number, flag, pointer, number, number, pointer, number, number, *[pointer] * 4,
        ]  # fmt: skip
        self.library.multiply_packed.restype = None
        self.library.header_fields.restype = number
        self.library.write_header.argtypes = [*[number] * 4, pointer]
        self.library.write_header.restype = None
        self.library.multiply_stacked.argtypes = [
            flag, pointer, number, number, pointer, pointer, number, number,
            pointer, pointer, number, pointer,
        ]  # fmt: skip
        self.library.multiply_stacked.restype = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Serve CpuBackend("amx") and the operators."""
        monkeypatch.setattr(ops, "missing_reason", "")
        monkeypatch.setattr(torch.ops.permllm, "cpu_packs_int8", self.packs_int8, raising=False)
        monkeypatch.setattr(torch.ops.permllm, "cpu_pack", self.pack, raising=False)
        monkeypatch.setattr(torch.ops.permllm, "cpu_pack_dense", self.pack_dense, raising=False)
        monkeypatch.setattr(ops, "sparse_linear", self.multiply)
        monkeypatch.setattr(torch.ops.permllm, "sparse_experts", self.multiply_experts)

    def packs_int8(self, isa: str) -> bool:
        assert isa == "amx"
        return self.library.packs_int8()

    def pack(
        self,
        values: Tensor,
        mask: Tensor,
        permutation: Tensor | None,
        block_size: int,
        isa: str,
        group: int = 8,
    ) -> tuple[Tensor, Tensor]:
        """The packed bytes, and what `multiply` must know of them."""
        assert isa == "amx"
        int8, n, k = values.dtype == torch.int8, len(values), values.shape[1] * 2
        held = [values.contiguous(), mask.contiguous()]
        strays = ctypes.c_int64()
        kind = self.library.packed_type(int8, held[0].data_ptr(), n, k, ctypes.byref(strays))
        layout = [kind, strays.value, n, k]
        packed = torch.empty(self.library.packed_size(*layout), dtype=torch.uint8)
        assert packed.data_ptr() % ALIGNMENT == 0
        self.emulation.set_threads(torch.get_num_threads())
        bad = self.library.pack_weight(
            int8, *map(address, (*held, permutation)), block_size, group, n, k, packed.data_ptr()
        )
        assert bad == -1
        return packed, self._header(*layout)

    def pack_dense(self, values: Tensor, isa: str) -> tuple[Tensor, Tensor]:
        """The same of dense rows of int8 values."""
        assert isa == "amx"
        n, k = values.shape
        if k > MOST_DENSE8:
            return torch.empty(0, dtype=torch.uint8), self._header(DENSE8, 0, n, k)
        packed = torch.empty(self.library.packed_size(DENSE8, 0, n, k), dtype=torch.uint8)
        assert packed.data_ptr() % ALIGNMENT == 0
        self.emulation.set_threads(torch.get_num_threads())
        held = values.contiguous()
        self.library.pack_dense_weight(held.data_ptr(), n, k, packed.data_ptr())
        return packed, self._header(DENSE8, 0, n, k)

    def multiply(
        self,
        x: Tensor,
        packed: Tensor,
        metadata: Tensor,
        permutation: Tensor | None,
        scale: Tensor | None,
        bias: Tensor | None,
        out_features: int,
        pattern: str,
    ) -> Tensor:
        kind, strays, n, k = metadata[[VALUES, STRAYS, OUTPUTS, INPUTS]].tolist()
        rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, k).contiguous()
        y = torch.full((len(rows), n), torch.nan, dtype=x.dtype)
        self.emulation.set_threads(torch.get_num_threads())
        if len(rows) > 0:
            self.library.multiply_packed(
                kind, strays, x.dtype == torch.float16, rows.data_ptr(), rows.stride(0), len(rows),
                packed.data_ptr(), n, k, *map(address, (bias, scale, permutation)), y.data_ptr(),
            )  # fmt: skip
        assert self.emulation.violation() == ""
        assert self.emulation.library.configured_units() == 0
        return y.view(*x.shape[:-1], n)

    def multiply_experts(self, x: Tensor, weights: Tensor, ids: Tensor, *operands: Any) -> Tensor:
        y = torch.full(x.shape, torch.nan, dtype=x.dtype)
        stacks = [_stacked(*operands[:4]), _stacked(*operands[4:8])]
        activation = operands[9] if len(operands) > 9 else 0
        self.emulation.set_threads(torch.get_num_threads())
        if len(x) > 0:
            self.library.multiply_stacked(
                x.dtype == torch.float16, x.data_ptr(), x.stride(0), len(x), weights.data_ptr(),
                ids.data_ptr(), ids.shape[1], len(operands[1]),
                *map(ctypes.byref, stacks), activation, y.data_ptr(),
            )  # fmt: skip
        assert self.emulation.violation() == ""
        assert self.emulation.library.configured_units() == 0
        return y

    def _header(self, kind: int, strays: int, n: int, k: int) -> Tensor:
        header = torch.empty(self.library.header_fields(), dtype=torch.int64)
        self.library.write_header(kind, strays, n, k, header.data_ptr())
        return header


def _stacked(
    packed: Tensor, metadata: Tensor, gather: Tensor | None, scale: Tensor | None
) -> StackedLinear:
    """The struct of experts.h, which points to these."""
    pointers = map(address, (packed, metadata, gather, scale))
    return StackedLinear(*pointers, *metadata[0, [OUTPUTS, INPUTS]].tolist())
