"""Our packed bytes against NVIDIA's own code, which runs on the CPU here."""

import ctypes

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import CudaBackend, interleave_int8
from tests.cuda.layers import int8_layer, metadata_byte, places, replace

NAMES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.int8: "int8"}


@pytest.fixture(scope="module")
def sm90(compile_with_cutlass):
    library = compile_with_cutlass("nvidia_sm90.cpp", "-O0")
    library.metadata_byte_of_layout.restype = ctypes.c_int64
    return library


@pytest.fixture(scope="module")
def sm80(compile_with_cutlass):
    return compile_with_cutlass("nvidia_sm80.cpp", "-O1")


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


def compress(sm90, dense):
    rows, inputs = dense.shape
    values = torch.zeros(rows, round_up(inputs, 32) // 2, dtype=dense.dtype)
    metadata = torch.zeros(round_up(rows, 64) * round_up(inputs, 128) // 8, dtype=torch.uint8)
    # The compressor packs values at the row pitch it pads inputs to.
    flat = torch.zeros(values.numel(), dtype=dense.dtype)
    getattr(sm90, f"compress_{NAMES[dense.dtype]}")(
        pointer(dense), rows, inputs, pointer(flat), pointer(metadata)
    )
    return flat, metadata


def layer_without_zeros(n, k, dtype):
    if dtype == torch.int8:
        layer = int8_layer(n, k, permuted=False)
        values = layer.weights.values
        return replace(layer.weights, values=values.masked_fill(values == 0, 1))
    weights = random_layer(n, k, permuted=False).weights
    return replace(weights, values=weights.values.to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), [(64, 128), (256, 512), (100, 176), (96, 416), (8, 16)])
def test_bytes_are_those_of_the_compressor(sm90, n, k, dtype):
    weights = layer_without_zeros(n, k, dtype)
    packed = CudaBackend(dtype).pack(weights)
    values, metadata = compress(sm90, permuted_dense(weights))
    ours = packed.packed[:n, : k // 2].contiguous()
    assert torch.equal(ours.view(torch.uint8).flatten(), values[: n * k // 2].view(torch.uint8))

    theirs = metadata.view(-1, round_up(n, 64) // 64, 1024)
    whole = torch.zeros(round_up(n, 64), round_up(k, 128), dtype=torch.bool)
    whole[:n, :k] = True
    compared = 0
    for m in range(theirs.shape[1] * 64):
        for byte in range(0, whole.shape[1], 8):
            if whole[m, byte]:
                offset = metadata_byte(m, byte, theirs.shape[1] * 64)
                mine = metadata_byte(m, byte, packed.packed.shape[0])
                assert theirs.flatten()[offset] == packed.metadata.flatten()[mine]
                compared += 1
    assert compared == n * k // 8
    if k % 128 == 0 and n % 64 == 0:
        assert torch.equal(theirs, packed.metadata[:, : theirs.shape[1]])


def test_the_whole_buffer_is_that_of_the_compressor(sm90):
    weights = layer_without_zeros(256, 640, torch.bfloat16)
    packed = CudaBackend(torch.bfloat16).pack(weights)
    values, metadata = compress(sm90, permuted_dense(weights))
    assert torch.equal(packed.packed.flatten().view(torch.int16), values.view(torch.int16))
    assert torch.equal(packed.metadata.flatten(), metadata)


def places_of_8_bits(metadata, m, k, padded_rows):
    """CUTLASS' order for 8-bit types: rows of 128 inputs, 64 rows, 128 inputs by 128 inputs."""
    element = k % 128 + 128 * (m % 64) + 8192 * (m // 64) + padded_rows * 128 * (k // 128)
    nibble = int(metadata[element // 8]) >> (4 if element % 8 else 0) & 15
    return nibble & 3, nibble >> 2


@pytest.mark.parametrize(("n", "k"), [(192, 1024), (100, 416), (96, 160)])
def test_int8_values_are_those_of_the_compressor(sm90, n, k):
    """Values before we interleave them, and for each group the same places."""
    weights = layer_without_zeros(n, k, torch.int8)
    packed = CudaBackend(torch.bfloat16).pack(weights)
    values, metadata = compress(sm90, permuted_dense(weights))
    theirs = values[: n * k // 2].view(n, k // 2)
    assert torch.equal(weights.values, theirs)
    assert torch.equal(packed.packed[:n, : k // 2], interleave_int8(theirs))
    for m in range(n):
        for group in range(0, k, 4):
            expected = places_of_8_bits(metadata, m, group, round_up(n, 64))
            assert places(packed.metadata, m, group, packed.packed.shape[0]) == expected


def layer_with_zeros(n, k, dtype):
    weights = random_layer(n, k, permuted=False, zeros=True).weights
    if dtype != torch.int8:
        return replace(weights, values=weights.values.to(dtype))
    values = (weights.values.float() * k**0.5 * 40).round().clamp(-128, 127).to(dtype)
    return replace(weights, values=values, scale=torch.ones(n))


@pytest.mark.parametrize("dtype", NAMES)
@pytest.mark.parametrize(("n", "k"), [(100, 416), (64, 256)])
def test_zeros_decompress_to_the_same_weight(sm90, n, k, dtype):
    """With explicit zeros and empty groups the compressor may name other places; ours ascend.

    -0.0 among pruned weights corrupted vLLM's former kernels; here masks decide, not values.
    """
    weights = layer_with_zeros(n, k, dtype)
    dense = permuted_dense(weights)
    if dtype != torch.int8:
        dense[:, ::5] = torch.where(dense[:, ::5] == 0, -0.0, dense[:, ::5])
    packed = CudaBackend(torch.float16 if dtype == torch.float16 else torch.bfloat16).pack(weights)
    ordered = weights.values if dtype == torch.int8 else packed.packed
    theirs_at = places_of_8_bits if dtype == torch.int8 else places
    values, metadata = compress(sm90, dense)
    differ = 0
    for m in range(n):
        for group in range(k // 4):
            first, second = places(packed.metadata, m, group * 4, 128)
            assert first < second
            ours, theirs = [0.0] * 4, [0.0] * 4
            ours[first], ours[second] = ordered[m, 2 * group : 2 * group + 2].tolist()
            where = theirs_at(metadata, m, group * 4, round_up(n, 64))
            pair = values[m * k // 2 + 2 * group :][:2].tolist()
            for place, value in zip(where, pair, strict=True):
                theirs[place] += value
            differ += where != (first, second)
            assert ours == theirs
    assert differ > 0, "the test drew no group on which the two differ"


@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 512), (320, 1152)])
def test_the_formula_is_the_layout_that_the_gemm_reads(sm90, n, k):
    for m in range(0, n, 7):
        for byte in range(0, k, 8):
            assert sm90.metadata_byte_of_layout(m, byte, n, k) == metadata_byte(m, byte, n)


def row_major_metadata(packed, n, k):
    nibbles = torch.zeros(n, k // 4, dtype=torch.int32)
    for m in range(n):
        for group in range(k // 4):
            first, second = places(packed.metadata, m, group * 4, packed.packed.shape[0])
            nibbles[m, group] = first | second << 2
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8).contiguous()


def test_nvidia_decompresses_our_values(sm80):
    n, k = 96, 256
    layer = random_layer(n, k, permuted=False, zeros=True)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    values, metadata = packed.packed[:n].contiguous(), row_major_metadata(packed, n, k)
    dense = torch.empty(n, k, dtype=torch.bfloat16)
    sm80.uncompress_16(pointer(values), pointer(metadata), n, k, pointer(dense))
    assert torch.equal(dense, layer.dense)


def test_nvidia_decompresses_our_int8_values(sm80):
    n, k = 48, 256
    weights = int8_layer(n, k, permuted=False).weights
    packed = CudaBackend(torch.bfloat16).pack(weights)
    metadata = row_major_metadata(packed, n, k)
    dense = torch.empty(n, k, dtype=torch.int8)
    sm80.uncompress_8(pointer(weights.values), pointer(metadata), n, k, pointer(dense))
    assert torch.equal(dense, permuted_dense(weights))


def test_the_sm80_order_holds_the_same_words(sm80):
    """CUTLASS 2.x wants another order of the same 16-bit words; this is the way between them."""
    n, k = 128, 256
    packed = CudaBackend(torch.bfloat16).pack(random_layer(n, k, permuted=False).weights)
    metadata = row_major_metadata(packed, n, k)
    reordered = torch.empty_like(metadata)
    sm80.reorder_16(pointer(metadata), n, k, pointer(reordered))
    words, theirs = metadata.view(torch.int16), reordered.view(torch.int16).flatten()
    for m in range(n):
        for column in range(k // 16):
            row, at = m // 32 * 32 + m % 8 * 4 + m % 32 // 8, column
            if row % 2 != at % 2:
                row, at = (row + 1, at - 1) if at % 2 else (row - 1, at + 1)
            assert words[m, column] == theirs[at // 2 * n * 2 + row * 2 + at % 2]
