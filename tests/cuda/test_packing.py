"""The packer for NVIDIA GPUs, as tensor code on the CPU."""

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm.backends.cuda import (
    CudaBackend,
    interleave_int8,
    missing_architecture,
    pack_metadata,
    unsupported_reason,
)
from tests.cuda.layers import decode, int8_layer, replace


def bits(tensor):
    return tensor.view(torch.int16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("n", "k", "block_size"),
    [(1, 8, 0), (100, 176, 0), (96, 416, 32), (130, 320, 64), (8, 256, 128)],
)
def test_decodes_to_the_dense_weight(n, k, block_size, dtype):
    layer = random_layer(n, k, block_size=block_size or 64, permuted=block_size > 0, zeros=True)
    packed = CudaBackend(dtype).pack(layer.weights)
    assert packed.packed.shape == (-(-n // 128) * 128, -(-k // 128) * 64)
    assert packed.packed.dtype == dtype
    assert packed.metadata.numel() * 4 == packed.packed.numel()
    assert torch.equal(decode(packed, n, k), layer.dense.to(dtype))


def test_kept_zeros_keep_their_sign():
    layer = random_layer(16, 128, permuted=False, zeros=True)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    assert torch.equal(bits(packed.packed[:16]), bits(layer.weights.values))


def test_int8_stays_int8():
    layer = int8_layer(40, 192)
    packed = CudaBackend(torch.bfloat16).pack(layer.weights)
    assert packed.packed.dtype == torch.int8
    dense = decode(packed, 40, 192).double() * packed.scale.double()[:, None]
    torch.testing.assert_close(dense, layer.dense, rtol=1e-12, atol=0)


def test_the_kernels_find_two_pairs_in_four_bytes_of_int8():
    """Lane t of a row is given bytes 4 t .. 4 t + 3 and wants the pairs t and t + 4."""
    ordered = interleave_int8(torch.arange(32, dtype=torch.int8).view(1, 32))[0].tolist()
    for run in (0, 16):
        for t in range(4):
            first, second = run + 2 * t, run + 2 * (t + 4)
            four = ordered[run + 4 * t : run + 4 * t + 4]
            assert four == [first, first + 1, second, second + 1]


def test_float32_values_are_rounded_to_the_dtype_of_the_model():
    layer = random_layer(8, 64)
    weights = replace(layer.weights, values=layer.weights.values.float() + 2**-20)
    packed = CudaBackend(torch.float16).pack(weights)
    assert torch.equal(packed.packed[:8, :32], weights.values.half())


def test_a_permutation_that_moves_nothing_is_kept():
    """Other weights for the same layer, and graphs compiled for it, come with one that does."""
    layer = random_layer(8, 128)
    local = torch.arange(64, dtype=torch.uint8).repeat(2)
    packed = CudaBackend(torch.bfloat16).pack(replace(layer.weights, permutation=local))
    assert torch.equal(packed.permutation, torch.arange(128, dtype=torch.uint8))


def test_the_permutation_is_local_to_blocks_of_128():
    layer = random_layer(8, 320)
    permutation = CudaBackend(torch.bfloat16).pack(layer.weights).permutation
    assert permutation.dtype == torch.uint8
    assert permutation.shape == (384,)
    blocks = permutation.view(3, 128).long().sort(dim=1).values
    assert torch.equal(blocks, torch.arange(128).expand(3, 128))
    assert torch.equal(permutation[:64], layer.weights.permutation[:64])
    assert torch.equal(permutation[64:128], layer.weights.permutation[64:128] + 64)
    assert torch.equal(permutation[320:], torch.arange(64, 128, dtype=torch.uint8))


def test_padding_is_ordered():
    metadata = pack_metadata(torch.full((1, 1), 0x33, dtype=torch.uint8))
    assert metadata.shape == (1, 2, 1024)
    assert (metadata == 0x44).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": torch.full((16, 16), 0x37, dtype=torch.uint8)}, "keeps 3 weights in group 0 of"),
        ({"mask": torch.full((16, 15), 0x33, dtype=torch.uint8)}, r"uint8 \[16, 16\]"),
        ({"mask": torch.full((15, 16), 0x33, dtype=torch.uint8)}, "do not fit"),
        ({"mask": torch.full((16, 16), 0x33, dtype=torch.int8)}, r"uint8 \[16, 16\]"),
        ({"scale": torch.ones(16)}, "the scale is there"),
        ({"permutation": torch.zeros(128, dtype=torch.uint8)}, "no bijection"),
        ({"permutation": torch.arange(64, dtype=torch.uint8)}, "no bijection"),
    ],
)
def test_refuses_what_does_not_fit(changes, message):
    layer = random_layer(16, 128)
    with pytest.raises(RuntimeError, match=message):
        CudaBackend(torch.bfloat16).pack(replace(layer.weights, **changes))


def test_refuses_4_of_8_with_the_remedy():
    layer = random_layer(16, 128, "4:8")
    with pytest.raises(RuntimeError, match=r"4:8 has no CUDA kernel.*with the pattern 2:4.*CPU"):
        CudaBackend(torch.bfloat16).pack(layer.weights)


def test_gpus_of_amd_have_no_kernel(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "no kernel for AMD" in unsupported_reason(torch.device("cuda"), torch.bfloat16)


def test_refuses_float32_models():
    with pytest.raises(ValueError, match=r"not in float32.*bfloat16"):
        CudaBackend(torch.float32)


def test_a_model_in_float32_is_no_case_for_the_kernels():
    reason = unsupported_reason(torch.device("cuda"), torch.float32)
    assert "the model is float32: load it in bfloat16" in reason


@pytest.mark.parametrize(
    ("capability", "built", "message"),
    [
        ((7, 5), "80 90a", "7.5, sparse tensor cores need 8.0 or later: serve the dense model"),
        ((8, 0), "80 90a", ""),
        ((8, 9), "80 90a", ""),
        ((9, 0), "80 90a", ""),
        ((10, 0), "80 90a", "PERMLLM_CUDA_ARCHS=100"),
        ((8, 0), "89", "PERMLLM_CUDA_ARCHS=80"),
        ((12, 1), "80 100 120", ""),
        ((9, 0), "80", ""),
        ((13, 0), "80 120", ""),
        ((10, 3), "80 100", ""),
        ((10, 0), "80 103", "PERMLLM_CUDA_ARCHS=100"),
        ((10, 0), "80 100a", ""),
        ((10, 3), "80 100a", "PERMLLM_CUDA_ARCHS=100"),  # a: for 10.0 alone
        ((10, 3), "80 100f", ""),  # f: for its family
        ((11, 0), "80 100f", "PERMLLM_CUDA_ARCHS=110"),
        ((12, 1), "80 90a 120a", "PERMLLM_CUDA_ARCHS=120"),
    ],
)
def test_architectures(capability, built, message):
    reason = missing_architecture(capability, built.split())
    assert message in reason if message else not reason
