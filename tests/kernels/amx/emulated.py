"""The AMX kernels compiled for an emulated tile unit, and memory that ends at a guard page."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
COMPILE = ["g++", "-std=c++20", "-O1", "-Wall", "-Wextra"]
INSTRUCTION_SETS = {"avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_vbmi2"}

KERNELS = tuple(
    f"amx/{name}" for name in ("few", "many", "int8_few", "int8_several", "int8_many", "dense")
)
ORDER = ("few", "several", "many")
"""Of the kernels, as `run` in emulation.cpp numbers them; several are for int8 values alone."""
AROUND_KERNELS = (
    *("linear", "isa", "packing/pack", "packing/pack_dense"),
    *("packing/twelve_bits", "packing/four_bits"),
    *("threads/region", "threads/team", "memory/scratch", "memory/huge_pages"),
    *("experts/experts", "experts/steps", "experts/routing", "portable/experts"),
)
TAIL_BYTES = 128
PAGE = 4096
NAN = 0x7FC0
UNTOUCHED = 0x5A5A


def cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


NEEDS = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
    pytest.mark.skipif(
        not cpu_flags() >= INSTRUCTION_SETS, reason="this CPU lacks AVX-512 with BF16 and VBMI2"
    ),
]


class Emulation:
    """The shared library of emulation.cpp."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.library.set_threads.argtypes = [number, ctypes.c_bool]
        self.library.run.argtypes = [
            number, pointer, number, number, pointer, number, number, *[pointer] * 3,
        ]  # fmt: skip
        self.library.run_dense.argtypes = [pointer, *[number] * 2, pointer, *[number] * 2, pointer]
        self.library.reads_of_many.argtypes = [*[number] * 5, pointer]
        self.library.reads_of_many.restype = number
        self.library.reads_of_few.argtypes = [number, number, number, pointer]
        self.library.reads_of_few.restype = number
        self.library.count_regions.restype = number
        self.library.set_slow_page.argtypes = [pointer]
        self.library.take_violation.restype = ctypes.c_char_p
        self.library.take_multiply_adds.restype = number
        self.library.multiply_add.argtypes = [pointer, pointer, pointer]
        self.library.multiply_add_bytes.argtypes = [ctypes.c_bool, pointer, pointer, pointer]
        self.library.misuse.argtypes = [ctypes.c_char_p]
        self.library.misuse.restype = ctypes.c_bool

    def set_threads(self, count: int, in_turn: bool = False) -> None:
        self.library.set_threads(count, in_turn)

    def violation(self) -> str:
        return (self.library.take_violation() or b"").decode()


def emulation_at(path: Path) -> Emulation:
    """The library that PERMLLM_AMX_EMULATION names, or one that is built at `path`."""
    built = os.environ.get("PERMLLM_AMX_EMULATION")
    return Emulation(Path(built) if built else compile_emulation(path))


def compile_emulation(path: Path, flags: Sequence[str] = ()) -> Path:
    """Builds the library at `path`."""
    sources = [
        *(HERE / f"{name}.cpp" for name in ("emulation", "operators", "shares")),
        *(CSRC / "cpu" / f"{name}.cpp" for name in (*KERNELS, *AROUND_KERNELS)),
    ]
    options = ["-shared", "-fPIC", "-pthread", "-DPERMLLM_EMULATE_AMX", "-DPERMLLM_AMX"]
    options += [f"-I{CSRC}", f"-I{HERE}", "-isystem", str(Path(torch.__file__).parent / "include")]
    subprocess.run([*COMPILE, *options, *flags, *map(str, sources), "-o", str(path)], check=True)
    return path


LIBC = ctypes.CDLL(None)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class GuardedMemory:
    """Bytes that end where an unreadable page begins; reading on ends the process."""

    def __init__(self, content: NDArray[np.uint8]) -> None:
        readable = -(-content.size // PAGE) * PAGE
        self.mapped = readable + PAGE
        read_write, private_anonymous = 3, 0x22
        base = LIBC.mmap(None, self.mapped, read_write, private_anonymous, -1, 0)
        assert base not in (None, ctypes.c_void_p(-1).value)
        assert LIBC.mprotect(base + readable, PAGE, 0) == 0
        self.base = base
        self.address = base + readable - content.size
        ctypes.memmove(self.address, content.ctypes.data, content.size)

    def __enter__(self) -> int:
        return self.address

    def __exit__(self, *_: object) -> None:
        LIBC.munmap(self.base, self.mapped)


def to_bf16(values: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Bits, rounded to nearest even from float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def half_masks(rng: np.random.Generator, rows: int, inputs: int) -> NDArray[np.bool_]:
    """Masks that keep half of every 64 inputs, by 4, by 8, anywhere, or only at one end."""
    masks = np.zeros((rows, inputs), bool)
    for row in range(rows):
        group = (4, 8, 64, None)[row % 4]
        for first in range(0, inputs, 64):
            block = masks[row, first : first + 64]
            if group is None:
                half = block.size // 2
                block[:half] = row % 8 == 3
                block[half:] = row % 8 != 3
                continue
            for start in range(0, block.size, group):
                part = block[start : start + group]
                part[rng.permutation(part.size)[: part.size // 2]] = True
    return masks


def pack(weight: NDArray[np.number], mask: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """layout.h for 16 rows, with masks of padding filled up in a way of this test's own.

    An int8 weight is packed as it is, any other as bfloat16.
    """
    bits = weight if weight.dtype == np.int8 else to_bf16(weight)
    n, k = weight.shape
    groups, blocks = -(-n // 16), -(-k // 64)
    kept = np.zeros((groups * 16, blocks, 64), bool)
    kept[:n].reshape(n, -1)[:, :k] = mask
    dense = np.zeros(kept.shape, bits.dtype)
    dense[:n].reshape(n, -1)[:, :k] = np.where(mask, bits, 0)
    for row, block in np.argwhere(kept.sum(-1) < 32):
        padding = np.arange(64) if row >= n else np.arange(k - block * 64, 64)
        kept[row, block, padding[: 32 - kept[row, block].sum()]] = True
    positions = np.argsort(~kept, axis=-1, kind="stable")[..., :32]
    values = np.take_along_axis(dense, positions, -1)
    words = np.packbits(kept, axis=-1, bitorder="little").view("<u8")[..., 0]
    block = np.dtype([("mask", "<u8", 16), ("values", bits.dtype, (16, 32))])
    packed = np.zeros((groups, blocks), block)
    packed["mask"] = words.reshape(groups, 16, blocks).swapaxes(1, 2)
    packed["values"] = values.reshape(groups, 16, blocks, 32).swapaxes(1, 2)
    return np.concatenate([packed.reshape(-1).view(np.uint8), np.full(TAIL_BYTES, 0xFF, np.uint8)])


def run(
    emulation: Emulation,
    kernel: str,
    x: NDArray[np.float64],
    packed: NDArray[np.uint8],
    n: int,
    bias: NDArray[np.float64] | None,
    gap: int,
    slow: bool = False,
    scale: NDArray[np.float32] | None = None,
) -> NDArray[np.uint16]:
    """Rows of x `gap` elements apart with NaN between them, everything in guarded memory.

    With a scale the values are int8. With `slow`, the thread that first reads the first page of x
    is held up.
    """
    emulation.library.take_multiply_adds()
    m, k = x.shape
    rows = np.full((m, k + gap), NAN, np.uint16)
    rows[:, :k] = to_bf16(x)
    x_bits = rows.reshape(-1)[: m * (k + gap) - gap]
    y = np.full(m * n + 128, UNTOUCHED, np.uint16)
    y[64:-64] = NAN
    bias_bits = np.zeros(0, np.uint16) if bias is None else to_bf16(bias)
    scales = np.zeros(0, np.float32) if scale is None else scale
    with (
        GuardedMemory(x_bits.view(np.uint8)) as x_address,
        GuardedMemory(packed) as packed_address,
        GuardedMemory(bias_bits.view(np.uint8)) as bias_address,
        GuardedMemory(scales.view(np.uint8)) as scale_address,
    ):
        if slow:
            emulation.library.set_slow_page(x_address // PAGE * PAGE)
        emulation.library.run(
            ORDER.index(kernel), x_address, k + gap, m, packed_address, n, k,
            None if bias is None else bias_address, None if scale is None else scale_address,
            y[64:].ctypes.data,
        )  # fmt: skip
        if slow:
            emulation.library.set_slow_page(None)
    assert emulation.violation() == ""
    assert emulation.library.configured_units() == 0
    # bfloat16 inputs fill two tiles of a block; int8 fill one, met by both bytes of few tokens.
    products = 1 if scale is not None and kernel != "few" else 2
    row_groups = 2 * -(-n // 32)
    expected = row_groups * -(-k // 64) * products * -(-m // 16)
    assert emulation.library.take_multiply_adds() == expected
    assert (y[:64] == UNTOUCHED).all()
    assert (y[-64:] == UNTOUCHED).all()
    return y[64:-64].reshape(m, n)
