"""Calls the kernels on the emulator (emulated_kernels.cpp) with PyTorch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_vllm.backends import PackedWeights

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "element", "int8", "tokens", "rows", "inputs", "padded_rows", "padded_inputs",
            "x_stride",
        )),
        *((name, ctypes.c_void_p) for name in (
            "x", "values", "metadata", "permutation", "scale", "bias", "y",
        )),
    ]  # fmt: skip


class _Device(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int) for name in ("index", "capability", "processors", "per_processor")
    ]


@dataclass(frozen=True)
class Gpu:
    """What plans depend on; shared memory in bytes, of a block for comparison."""

    capability: int
    processors: int
    per_block: int
    per_processor: int

    def as_struct(self) -> _Device:
        return _Device(0, self.capability, self.processors, self.per_processor)


H100 = Gpu(90, 132, 227 << 10, 228 << 10)
A100 = Gpu(80, 108, 163 << 10, 164 << 10)
L4 = Gpu(89, 58, 99 << 10, 100 << 10)
SMALL = Gpu(90, 4, 227 << 10, 228 << 10)


@dataclass(frozen=True)
class Plan:
    token_tiles: int
    steps_per_split: int
    splits: int
    shared_bytes: int


class EmulatorError(RuntimeError):
    """A kernel did what a GPU would not forgive."""


class Emulator:
    """The compiled emulator."""

    def __init__(self, library: ctypes.CDLL):
        self._library = library
        for function in (library.emulate_linear, library.emulate_permute, library.site):
            function.restype = ctypes.c_char_p

    def linear(
        self,
        x: Tensor,
        packed: PackedWeights,
        bias: Tensor | None,
        rows: int,
        *,
        gpu: Gpu = SMALL,
        seed: int = 0,
    ) -> Tensor:
        y = torch.empty(x.shape[0], rows, dtype=x.dtype)
        tensors = [
            x, packed.packed, packed.metadata, packed.permutation, packed.scale, bias, y,
        ]  # fmt: skip
        assert x.stride(1) == 1
        assert all(tensor is None or tensor.is_contiguous() for tensor in tensors[1:])
        layer = _Layer(
            ELEMENTS[x.dtype],
            packed.packed.dtype == torch.int8,
            x.shape[0],
            rows,
            x.shape[1],
            packed.packed.shape[0],
            packed.packed.shape[1] * 2,
            x.stride(0),
            *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
        )
        device = gpu.as_struct()
        _raise(self._library.emulate_linear(ctypes.byref(layer), ctypes.byref(device), seed))
        return y

    def permute(self, x: Tensor, permutation: Tensor, seed: int = 0) -> Tensor:
        y = torch.empty_like(x)
        error = self._library.emulate_permute(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(permutation.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            seed,
        )
        _raise(error)
        return y

    def plan(self, rows: int, inputs: int, tokens: int, *, int8: bool, gpu: Gpu) -> Plan:
        """How the product by mma.sp is cut."""
        result = (ctypes.c_int * 4)()
        device = gpu.as_struct()
        self._library.plan(rows, inputs, tokens, int8, ctypes.byref(device), result)
        return Plan(*result)

    def choice(
        self,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        gpu: Gpu,
        int8: bool = False,
        permuted: bool = True,
    ) -> tuple[bool, bool]:
        """Whether CUTLASS' GEMM multiplies, and whether a pass permutes in front."""
        gemm, passes = ctypes.c_bool(), ctypes.c_bool()
        device = gpu.as_struct()
        self._library.choose(
            rows, inputs, tokens, int8, permuted, ctypes.byref(device), ctypes.byref(gemm),
            ctypes.byref(passes),
        )  # fmt: skip
        return gemm.value, passes.value

    def largest_grids(self) -> list[int]:
        """Blocks in the second and third dimension of launches for the largest sizes."""
        result = (ctypes.c_int * 6)()
        self._library.largest_grids(result)
        return list(result)

    def sites(self) -> list[str]:
        """The barriers and waits that kernels have come to, as `file:line name`."""
        return [self._library.site(i).decode() for i in range(self._library.sites())]

    @contextmanager
    def without(self, site: int) -> Iterator[None]:
        """Leaves out one of `sites`."""
        self._library.leave_out(site)
        try:
            yield
        finally:
            self._library.leave_out(-1)


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise EmulatorError(error.decode())
