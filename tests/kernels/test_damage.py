"""A packed weight of 12 bits whose places were damaged in memory: no kernel leaves its memory.

Behind the blocks stands where values are that have no 12 bits: the first of each row group, and of
each its input and row. (The order of inputs behind them is damaged in test_memory.py.) The kernels
are tried in a process of their own, which a wrong access ends.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.backends.weights import PackedWeights
from tests.kernels.cases import TWELVE_BITS
from tests.kernels.test_twelve_bits import layer_of

N, K = 64, 1024
ROWS = {"amx": 16, "zen5": 8, "avx512_bf16": 8}
"""Of a row group, by instruction set that stores 12 bits."""
TOKENS = (1, 2, 10, 12, 16, 17, 40, 64)  # every kernel
ROW_BYTES = {"sparse": 56, "dense": 96}
"""Of a block."""
FIRSTS = (-(2**31), -1, 3, 2**31 - 1)
INPUTS = (K, K + 63, 2**31 - 1, 2**31, 2**32 - 1)
BAD_ROWS = (16, 0x7FFF, 0xFFFF)


def places(packed: Tensor, kind: str, rows: int) -> tuple[Tensor, Tensor]:
    """The first stray of every row group, int32; and of every stray input, row and value, int16."""
    behind = packed[N * K // 64 * ROW_BYTES[kind] :]
    first = behind[N : N + 4 * (N // rows + 1)].view(torch.int32)
    strays = behind[N + first.nbytes :][: 8 * int(first[-1])]
    return first, strays.view(torch.int16).view(-1, 4)


def as_word(value: int, bits: int) -> int:
    """The signed integer with the bits of an unsigned one."""
    return value - (1 << bits) if value >> (bits - 1) else value


def damages(packed: Tensor, kind: str, rows: int) -> Iterator[tuple[Tensor, Tensor, slice]]:
    """Of a packed weight: one that is damaged, one that shall answer alike, and in which rows."""
    for value in FIRSTS:
        for entry in range(N // rows + 1):
            bad = packed.clone()
            places(bad, kind, rows)[0][entry] = value
            yield bad, packed, slice(0, max(entry - 1, 0) * rows)
            yield bad, packed, slice((entry + 1) * rows, N)
    for stray in range(len(places(packed, kind, rows)[1])):
        without = packed.clone()
        places(without, kind, rows)[1][stray, 3] = 0
        for given in INPUTS:
            bad = packed.clone()
            places(bad, kind, rows)[1][stray, :2] = (
                torch.tensor([as_word(given, 32)]).int().view(torch.int16)
            )
            yield bad, without, slice(0, N)
        for row in BAD_ROWS:
            bad = packed.clone()
            places(bad, kind, rows)[1][stray, 2] = as_word(row, 16)
            yield bad, without, slice(0, N)


def check(
    kind: str,
    rows: int,
    packed: Tensor,
    multiply: Callable[[Tensor, Tensor], Tensor],
    apart: bool = True,
) -> None:
    """Multiplies with every damage; `apart` where each output is that of one row."""
    for m in TOKENS:
        x = torch.randn(m, K, generator=torch.Generator().manual_seed(m)).bfloat16()
        for bad, good, alike in damages(packed, kind, rows):
            y, expected = multiply(x, bad), multiply(x, good)
            assert y.isfinite().all()
            if apart or alike == slice(0, N):
                assert torch.equal(y[:, alike], expected[:, alike])


def with_strays(count: int) -> Tensor:
    """Rows of so many values; the second of every 16 has one that is far below the others."""
    values = torch.ones(N, count, dtype=torch.bfloat16)
    for group in range(N // 16):
        values[group * 16 + 1, 100 * group + 3] = -(2.0**-20)
    return values


def linear(packed: PackedWeights) -> Callable[[Tensor, Tensor], Tensor]:
    """The product of x and the bytes of such a weight."""
    metadata = packed.metadata
    return lambda x, blob: ops.sparse_linear(x, blob, metadata, None, None, None, N, "")


def check_layer(isa: str) -> None:
    packed = CpuBackend(isa).pack(layer_of(with_strays(K // 2)).weights)
    check("sparse", ROWS[isa], packed.packed, linear(packed))


def check_head(isa: str) -> None:
    packed = CpuBackend(isa).pack_dense(with_strays(K))
    assert packed is not None
    check("dense", ROWS[isa], packed.packed, linear(packed))


def check_experts(isa: str) -> None:
    """One expert, whose gate and up are damaged."""
    backend = CpuBackend(isa)
    packed = backend.pack(layer_of(with_strays(K // 2)).weights)
    gate_up = backend.stack([packed])
    down = backend.stack([backend.pack(random_layer(K, N // 2, permuted=False).weights)])

    def multiply(x: Tensor, blob: Tensor) -> Tensor:
        routed = torch.ones(len(x), 1), torch.zeros(len(x), 1, dtype=torch.int32)
        y: Tensor = torch.ops.permllm.sparse_experts(
            *(x, *routed, blob, gate_up.metadata, None, None),
            *(down.packed, down.metadata, None, None, N // 2),
        )
        return y

    check("sparse", ROWS[isa], gate_up.packed[: packed.packed.numel()], multiply, apart=False)


@pytest.mark.parametrize(
    ("isa", "what"),
    [(isa, what) for isa in TWELVE_BITS for what in ("layer", "head", "experts")],
)
def test_damaged_places_are_left_out(isa: str, what: str) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this CPU or build does not run {isa}")
    if what == "head" and CpuBackend(isa).pack_dense(with_strays(K)) is None:
        pytest.skip(f"{isa} stores no dense rows in 12 bits")
    code = f"from tests.kernels import test_damage\ntest_damage.check_{what}({isa!r})"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:] or f"signal {-result.returncode}"
