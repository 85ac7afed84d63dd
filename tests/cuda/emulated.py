"""Calls the kernels on the emulator (emulated_kernels.cpp) with PyTorch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_vllm.backends import PackedWeights
from permllm_vllm.backends.weights import StackedWeights
from tests.kernels.test_experts import RELU2

ELEMENTS = {torch.bfloat16: 0, torch.float16: 1}
KERNELS = (  # LinearKernel
    "few_tokens",
    "many_tokens_mma",
    "many_tokens_sm90",
    "many_tokens_sm90_permuting",
    "many_tokens_sm100",
)
CUTLASS_KERNELS = ("sm90", "sm100", "sm103")


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
        *((name, ctypes.c_int) for name in (
            "capability", "processors", "per_block", "per_processor", "index",
        )),
        ("overlaps", ctypes.c_bool),
    ]  # fmt: skip


class _Stack(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in (
            "int8", "rows", "inputs", "padded_rows", "padded_inputs",
        )),
        *((name, ctypes.c_void_p) for name in ("values", "metadata", "permutation", "scale")),
    ]  # fmt: skip


class _Experts(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int) for name in ("element", "tokens", "choices", "experts")),
        *((name, ctypes.c_int) for name in ("x_stride", "activation")),
        *((name, ctypes.c_void_p) for name in ("x", "ids", "weights")),
        *((name, _Stack) for name in ("gate_up", "down")),
        ("y", ctypes.c_void_p),
    ]


@dataclass(frozen=True)
class Gpu:
    """What plans depend on; shared memory in bytes."""

    capability: int
    processors: int
    per_block: int
    per_processor: int

    def as_struct(self) -> _Device:
        return _Device(self.capability, self.processors, self.per_block, self.per_processor)


H100 = Gpu(90, 132, 227 << 10, 228 << 10)
A100 = Gpu(80, 108, 163 << 10, 164 << 10)
L4 = Gpu(89, 58, 99 << 10, 100 << 10)
SMALL = Gpu(90, 4, 227 << 10, 228 << 10)


@dataclass(frozen=True)
class Plan:
    rows: int
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
        for function in (
            library.emulate_linear,
            library.emulate_experts,
            library.emulate_permute,
            library.emulate_stages,
            library.site,
            library.force,
        ):
            function.restype = ctypes.c_char_p

    def linear(
        self,
        x: Tensor,
        packed: PackedWeights,
        bias: Tensor | None,
        rows: int,
        *,
        kernel: int = 0,
        block_rows: int = 0,
        gpu: Gpu = SMALL,
        seed: int = 0,
    ) -> Tensor:
        """`kernel` is 0 for few tokens, or the token tile of the many-token kernel: 64 or 128.

        `block_rows` are those of the blocks for few tokens, 0 as they are planned.
        """
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
        _raise(
            self._library.emulate_linear(
                ctypes.byref(layer), kernel, block_rows, ctypes.byref(device), seed
            )
        )
        return y

    def experts(
        self,
        x: Tensor,
        weights: Tensor,
        ids: Tensor,
        gate_up: StackedWeights,
        down: StackedWeights,
        inner: int,
        activation: int = 0,
        *,
        gpu: Gpu = SMALL,
        seed: int = 0,
    ) -> tuple[Tensor, int]:
        """The result, and how many blocks of pairs there were."""
        outputs = inner if activation == RELU2 else 2 * inner
        y = torch.empty(x.shape, dtype=x.dtype)
        assert ids.dtype == torch.int32
        assert weights.dtype == torch.float32
        assert x.stride(1) == 1
        assert ids.is_contiguous()
        assert weights.is_contiguous()
        experts = _Experts(
            ELEMENTS[x.dtype],
            *ids.shape,
            len(gate_up.packed),
            x.stride(0),
            activation,
            *(tensor.data_ptr() for tensor in (x, ids, weights)),
            _stack(gate_up, outputs, x.shape[1]),
            _stack(down, x.shape[1], inner),
            y.data_ptr(),
        )
        device, blocks = gpu.as_struct(), ctypes.c_int()
        _raise(
            self._library.emulate_experts(
                ctypes.byref(experts), ctypes.byref(device), seed, ctypes.byref(blocks)
            )
        )
        return y, blocks.value

    def permute(self, x: Tensor, permutation: Tensor, seed: int = 0) -> Tensor:
        y = torch.empty_like(x)
        error = self._library.emulate_permute(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(permutation.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            ctypes.c_int64(x.shape[0]),
            ctypes.c_int64(x.shape[1]),
            x.element_size(),
            seed,
        )
        _raise(error)
        return y

    def permute_stages(self, x: Tensor, permutation: Tensor, tile: int, seed: int = 0) -> Tensor:
        """Stages of `tile` tokens x 128 inputs `[stages, tile, 128]`, as their bytes lie."""
        assert x.shape[1:] == (tile, 128)
        assert permutation.numel() == x.shape[0] * 128
        y = torch.empty_like(x)
        error = self._library.emulate_stages(
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(permutation.data_ptr()),
            ctypes.c_void_p(y.data_ptr()),
            tile,
            len(x),
            seed,
        )
        _raise(error)
        return y

    def plan(
        self,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        int8: bool,
        gpu: Gpu,
        permuted: bool = False,
        block_rows: int = 0,
    ) -> Plan:
        """How the kernel for few tokens cuts its work, in blocks of `block_rows` if not 0."""
        result = (ctypes.c_int * 5)()
        device = gpu.as_struct()
        self._library.plan(
            rows, inputs, tokens, int8, permuted, block_rows, ctypes.byref(device), result
        )
        return Plan(*result)

    def choice(
        self,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        gpu: Gpu,
        built: str,
        int8: bool = False,
        permuted: bool = False,
    ) -> tuple[str, int]:
        """The kernel that the operator takes and its tile of tokens, 0 for few tokens.

        `built` names those of CUTLASS_KERNELS that the build has, separated by blanks.
        """
        return self._choose(rows, inputs, tokens, int8, permuted, gpu, built)[:2]

    def takes_a_pass(
        self, rows: int, inputs: int, tokens: int, *, gpu: Gpu, built: str = "", int8: bool = False
    ) -> bool:
        """Whether activations are permuted in front of the product."""
        return self._choose(rows, inputs, tokens, int8, True, gpu, built)[2]

    def _choose(
        self, rows: int, inputs: int, tokens: int, int8: bool, permuted: bool, gpu: Gpu, built: str
    ) -> tuple[str, int, bool]:
        tile, passes = ctypes.c_int(), ctypes.c_bool()
        device = gpu.as_struct()
        kernel = self._library.choose(
            rows, inputs, tokens, int8, permuted, ctypes.byref(device), _built(built),
            ctypes.byref(tile), ctypes.byref(passes),
        )  # fmt: skip
        return KERNELS[kernel], tile.value, passes.value

    def clocks(
        self,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        gpu: Gpu,
        built: str,
        int8: bool = False,
        permuted: bool = False,
    ) -> tuple[int, int]:
        """Of the kernel for few tokens and of that for many, with the passes that they need."""
        return self._compare(rows, inputs, tokens, gpu, built, int8, permuted)[:2]

    def many(
        self,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        gpu: Gpu,
        built: str,
        int8: bool = False,
        permuted: bool = False,
    ) -> tuple[str, int]:
        """The kernel for many tokens and its tile, whether or not that for few takes less."""
        return self._compare(rows, inputs, tokens, gpu, built, int8, permuted)[2:]

    def _compare(
        self, rows: int, inputs: int, tokens: int, gpu: Gpu, built: str, int8: bool, permuted: bool
    ) -> tuple[int, int, str, int]:
        few, many, tile = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int()
        device = gpu.as_struct()
        kernel = self._library.clocks(
            rows, inputs, tokens, int8, permuted, ctypes.byref(device), _built(built),
            ctypes.byref(few), ctypes.byref(many), ctypes.byref(tile),
        )  # fmt: skip
        return few.value, many.value, KERNELS[kernel], tile.value

    def force(
        self,
        text: str,
        rows: int,
        inputs: int,
        tokens: int,
        *,
        gpu: Gpu,
        built: str = "",
        int8: bool = False,
        permuted: bool = True,
    ) -> str | tuple[str, int, int]:
        """The kernel, tile and splits that are forced, or why they cannot be."""
        result = (ctypes.c_int * 3)()
        device = gpu.as_struct()
        reason: bytes = self._library.force(
            text.encode(), rows, inputs, tokens, int8, permuted, ctypes.byref(device),
            _built(built), result,
        )  # fmt: skip
        return reason.decode() or (KERNELS[result[0]], result[1], result[2])

    def largest_grids(self) -> list[int]:
        """Blocks in the second and third dimension of launches for the largest sizes."""
        result = (ctypes.c_int * 14)()
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


def _built(text: str) -> ctypes.Array[ctypes.c_bool]:
    """CutlassKernels."""
    names = text.split()
    assert set(names) <= set(CUTLASS_KERNELS)
    return (ctypes.c_bool * len(CUTLASS_KERNELS))(*(name in names for name in CUTLASS_KERNELS))


def _raise(error: bytes | None) -> None:
    if error is not None:
        raise EmulatorError(error.decode())


def _stack(stacked: StackedWeights, rows: int, inputs: int) -> _Stack:
    _, padded_rows, columns = stacked.packed.shape
    tensors = (stacked.packed, stacked.metadata, stacked.permutation, stacked.scale)
    assert all(tensor is None or tensor.is_contiguous() for tensor in tensors)
    return _Stack(
        stacked.packed.dtype == torch.int8,
        rows,
        inputs,
        padded_rows,
        columns * 2,
        *(None if tensor is None else tensor.data_ptr() for tensor in tensors),
    )
