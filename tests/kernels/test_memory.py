"""Kernels read nothing outside their arguments: these end where a page without access begins."""

import ctypes
import itertools
import mmap
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.weights import PackedWeights

PAGE = mmap.PAGESIZE
HUGE_PAGE = 2 << 20


def before_a_guard(tensor: torch.Tensor) -> torch.Tensor:
    """A copy whose last byte is the last one before a page that cannot be read."""
    bytes_needed = tensor.numel() * tensor.element_size()
    pages = -(-bytes_needed // PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    guard = ctypes.c_void_p(address + pages * PAGE)
    assert libc.mprotect(guard, ctypes.c_size_t(PAGE), 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=pages * PAGE)
    copy = flat[pages * PAGE - bytes_needed :].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


LAYERS = (
    (5, 72, 64, False),
    (33, 200, 64, False),
    (70, 576, 64, False),
    (24, 128, 128, True),  # gathered by every instruction set
    (50, 576, 64, True),
)
"""Outputs, inputs, size of blocks, and whether these are permuted."""
TOKENS = (1, 2, 5, 9, 14, 16, 17, 31, 40, 100)


class Packed(NamedTuple):
    """A packed layer, the same before guards, its bias and its number of inputs."""

    plain: PackedWeights
    guarded: PackedWeights
    bias: torch.Tensor
    inputs: int


def packed_layers(isa: str) -> Iterator[Packed]:
    """Every layer, with both kinds of values."""
    for n, k, block_size, permuted in LAYERS:
        layer = random_layer(n, k, block_size=block_size, permuted=permuted, bias=True)
        assert layer.bias is not None
        for weights in (layer.weights, to_int8(layer).weights):
            packed = CpuBackend(isa).pack(weights)
            guarded = PackedWeights(
                before_a_guard(packed.packed),
                packed.metadata,
                None if packed.permutation is None else before_a_guard(packed.permutation),
                None if packed.scale is None else before_a_guard(packed.scale),
            )
            yield Packed(packed, guarded, before_a_guard(layer.bias), k)


def multiply(x: torch.Tensor, packed: PackedWeights, bias: torch.Tensor) -> torch.Tensor:
    operands = packed.packed, packed.metadata, packed.permutation, packed.scale
    return ops.sparse_linear(x, *operands, bias, len(bias), "2:4")


def check(isa: str) -> None:
    gathered = 0
    for plain, guarded, bias, k in packed_layers(isa):
        gathered += plain.permutation is not None
        for m in TOKENS:
            x = torch.randn(m, k).bfloat16()
            y = multiply(before_a_guard(x), guarded, bias)
            assert torch.equal(y, multiply(x, plain, bias.clone()))
    assert gathered >= 2


def check_damaged(isa: str) -> None:
    """Masks, values and what stands behind them are data: wrong ones give wrong numbers."""
    for _, guarded, bias, k in packed_layers(isa):
        for fill in (0, 0xFF, 0xA5):
            guarded.packed.fill_(fill)
            for m in TOKENS:
                x = before_a_guard(torch.ones(m, k).bfloat16())
                assert multiply(x, guarded, bias).shape == (m, len(bias))


def test_reads_stay_inside(isa: str) -> None:
    """In a process of its own, which a wrong read ends."""
    code = f"from tests.kernels import test_memory as m; m.check({isa!r}); m.check_damaged({isa!r})"
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:] or f"signal {-result.returncode}"


def mapped(address: int, size: int) -> dict[str, int]:
    """KiB of every kind in the mappings that these bytes touch, by the names in smaps."""
    found: dict[str, int] = {}
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(bound, 16) for bound in bounds.groups())
            inside = begin < address + size and address < end
        elif inside and (kind := re.match(r"(\w+): +(\d+) kB", line)):
            found[kind[1]] = found.get(kind[1], 0) + int(kind[2])
    return found


def in_huge_pages(address: int, size: int) -> int:
    """How many of these bytes lie in huge pages, where their mapping holds nothing else."""
    return mapped(address, size).get("AnonHugePages", 0) << 10


def grants_huge_pages(count: int) -> bool:
    """Whether the system gives so many to memory that asks for them."""
    with mmap.mmap(-1, (count + 1) * HUGE_PAGE, flags=mmap.MAP_PRIVATE) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        memory.write(bytes(len(memory)))
        view = ctypes.c_char.from_buffer(memory)
        found = in_huge_pages(ctypes.addressof(view), len(memory))
        del view  # or the mapping could not be closed
    return found >= count * HUGE_PAGE


def pack_models() -> None:
    """Packs and frees weights of several sizes, and checks where they lie.

    Tensors of a checkpoint are freed before the next layer is packed: their memory is touched.
    """
    shapes = ((576, 1536), (2048, 4096), (576, 576), (2560, 2048))
    layers = [random_layer(*shape).weights for shape in shapes]
    for _ in range(2):
        blobs = []
        for weights in layers * 3:
            freed = [torch.zeros(16 << 20, dtype=torch.uint8) for _ in range(3)]
            del freed
            blobs.append(CpuBackend().pack(weights).packed)
        first, size = blobs[0].data_ptr(), sum(blob.numel() for blob in blobs)
        ends = [(blob.data_ptr(), blob.data_ptr() + blob.numel()) for blob in blobs]
        assert all(begin % 64 == 0 for begin, _ in ends)
        assert all(0 <= begin - end < 64 for (_, end), (begin, _) in itertools.pairwise(ends))
        whole = -(-size // HUGE_PAGE) * HUGE_PAGE
        assert size <= mapped(first, size)["Rss"] << 10 <= whole + HUGE_PAGE
        if grants_huge_pages(whole // HUGE_PAGE):
            assert in_huge_pages(first, size) >= size // HUGE_PAGE * HUGE_PAGE

        expected = blobs[1].clone()
        del blobs[2:]
        rest = ends[1][1] - first
        assert rest <= mapped(first, rest)["Rss"] << 10 <= rest + 2 * HUGE_PAGE
        assert torch.equal(blobs[1], expected)
        blobs.append(CpuBackend().pack(layers[1]).packed)
        assert torch.equal(blobs[1], blobs[2])
        blobs.clear()
        assert not mapped(first, size)


def run_alone(code: str) -> None:
    """Run code in a process of its own, where nothing else is packed; it must succeed."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_blobs_share_huge_pages_and_give_them_back() -> None:
    run_alone("from tests.kernels.test_memory import pack_models; pack_models()")


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_blobs_are_packed_where_few_addresses_can_be_mapped() -> None:
    code = (
        "import resource, torch\n"
        "from benchmarks.shapes import random_layer\n"
        "from permllm_vllm.backends.cpu import CpuBackend\n"
        "weights = random_layer(576, 1536).weights\n"
        "CpuBackend().pack(weights)\n"
        "used = 1024 * int(open('/proc/self/statm').read().split()[0]) * 4\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)\n"
        "blobs = [CpuBackend().pack(weights).packed for _ in range(3)]\n"
        "assert all(torch.equal(blob, blobs[0]) for blob in blobs)"
    )
    run_alone(code)


@pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
def test_one_openmp_runtime() -> None:
    """The kernels run on torch's own threads: no second OpenMP runtime is in the process."""
    code = (
        "import torch\n"
        "from tests.kernels.test_memory import check\n"
        "torch.set_num_threads(2)\n"
        "check('portable')\n"
        "maps = open('/proc/self/maps').read().split()\n"
        "print(len({name for name in maps if 'libgomp' in name or 'libiomp' in name\n"
        "           or 'libomp' in name}))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "1", result.stdout + result.stderr[-2000:]
