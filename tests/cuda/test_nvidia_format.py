"""Our packed bytes against NVIDIA's own code, which runs on the CPU here."""

import ctypes
from dataclasses import dataclass

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend
from tests.cuda.layers import metadata_byte, places, replace

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
ROW_MULTIPLE = 64
"""To which NVIDIA pads rows; inputs are padded to 128."""


@dataclass(frozen=True)
class Nvidia:
    """NVIDIA's code for the operands of sm_90."""

    library: ctypes.CDLL

    def compress(self, dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values, in rows of the pitch to which the compressor pads inputs, and metadata."""
        rows, inputs = dense.shape
        values = torch.zeros(rows * round_up(inputs, 32) // 2, dtype=dense.dtype)
        padded = round_up(rows, ROW_MULTIPLE) * round_up(inputs, 128)
        metadata = torch.zeros(padded // 8, dtype=torch.uint8)
        function = getattr(self.library, f"compress_{NAMES[dense.dtype]}")
        function(pointer(dense), rows, inputs, pointer(values), pointer(metadata))
        return values, metadata

    def metadata_byte(self, *place: int) -> int:
        """Of (row, input, rows, inputs), by the layout that the GEMM is given."""
        self.library.metadata_byte.restype = ctypes.c_int64
        return self.library.metadata_byte(*place)


@pytest.fixture(scope="module")
def nvidia(compile_with_cutlass):
    return Nvidia(compile_with_cutlass("nvidia_compressor.cpp", "-O0"))


def pointer(tensor):
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def round_up(size, multiple):
    return -(-size // multiple) * multiple


def permuted_dense(weights):
    """The dense weight in permuted order, pruned weights being zeros."""
    mask = (weights.mask.unsqueeze(-1) >> torch.arange(8) & 1).bool().flatten(1)
    dense = torch.zeros(mask.shape, dtype=weights.values.dtype)
    return dense.masked_scatter_(mask, weights.values)


def weights_of(n, k, dtype, *, zeros=False):
    weights = random_layer(n, k, permuted=False, zeros=zeros).weights
    return replace(weights, values=weights.values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (256, 512), (100, 176), (96, 416), (8, 16)])
def test_bytes_are_those_of_the_compressor(nvidia, n, k, dtype):
    weights = weights_of(n, k, dtype)
    packed = CudaBackend(dtype).pack(weights)
    values, metadata = nvidia.compress(permuted_dense(weights))
    ours = packed.packed[:n, : k // 2].contiguous()
    assert torch.equal(ours.view(torch.uint8).flatten(), values[: n * k // 2].view(torch.uint8))

    their_rows = round_up(n, ROW_MULTIPLE)
    for m in range(n):
        for k_of_byte in range(0, k, 8):
            theirs = metadata[metadata_byte(m, k_of_byte, their_rows)]
            mine = packed.metadata.flatten()[metadata_byte(m, k_of_byte, packed.packed.shape[0])]
            assert theirs == mine
    if k % 128 == 0 and n % ROW_MULTIPLE == 0:
        planes = metadata.view(-1, their_rows // 64, 1024)
        assert torch.equal(planes, packed.metadata[:, : their_rows // 64])


def test_the_whole_buffer_is_that_of_the_compressor(nvidia):
    weights = weights_of(256, 640, torch.bfloat16)
    packed = CudaBackend(torch.bfloat16).pack(weights)
    values, metadata = nvidia.compress(permuted_dense(weights))
    assert torch.equal(packed.packed.flatten().view(torch.int16), values.view(torch.int16))
    assert torch.equal(packed.metadata.flatten(), metadata)


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("n", "k"), [(100, 416), (64, 256)])
def test_zeros_decompress_to_the_same_weight(nvidia, n, k, dtype):
    """With explicit zeros and empty groups the compressor may name other places; ours ascend.

    -0.0 among pruned weights corrupted vLLM's former kernels; here masks decide, not values.
    """
    weights = weights_of(n, k, dtype, zeros=True)
    dense = permuted_dense(weights)
    dense[:, ::5] = torch.where(dense[:, ::5] == 0, -0.0, dense[:, ::5])
    packed = CudaBackend(dtype).pack(weights)
    values, metadata = nvidia.compress(dense)
    differ = 0
    for m in range(n):
        for group in range(k // 4):
            first, second = places(packed.metadata, m, group * 4, 128)
            assert first < second
            ours, theirs = [0.0] * 4, [0.0] * 4
            ours[first], ours[second] = packed.packed[m, 2 * group : 2 * group + 2].tolist()
            where = places(metadata, m, group * 4, round_up(n, ROW_MULTIPLE))
            pair = values[m * k // 2 + 2 * group :][:2].tolist()
            for place, value in zip(where, pair, strict=True):
                theirs[place] += value
            differ += where != (first, second)
            assert ours == theirs
    assert differ > 0, "the test drew no group on which the two differ"


@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 512), (320, 1152)])
def test_the_formula_is_the_layout_that_the_gemm_reads(nvidia, n, k):
    padded = round_up(n, ROW_MULTIPLE)
    for m in range(0, n, 7):
        for byte in range(0, k, 8):
            assert nvidia.metadata_byte(m, byte, n, k) == metadata_byte(m, byte, padded)
