"""Wrong arguments give an error that says what is wrong; none of them crashes."""

import pytest
import torch

from benchmarks.shapes import random_layer
from permllm_vllm import ops
from permllm_vllm.backends.cpu import INT8_ONLY, SIXTEEN_BITS_ONLY, CpuBackend, instruction_sets

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason or "built")
N, K = 24, 128
# One that undoes permutations of small blocks, where there is one.
UNDOES = next(
    (isa for isa in instruction_sets() if isa in SIXTEEN_BITS_ONLY and isa not in INT8_ONLY), ""
)
needs_undoing = pytest.mark.skipif(not UNDOES, reason="no instruction set here undoes permutations")


@pytest.fixture
def layer():
    return random_layer(N, K)


@pytest.fixture
def packed(layer):
    return CpuBackend().pack(layer.weights)


def call(weights, x=None, **changes):
    arguments = {
        "x": torch.randn(2, K).bfloat16() if x is None else x,
        "packed": weights.packed,
        "metadata": weights.metadata,
        "permutation": None,
        "scale": None,
        "bias": None,
        "out_features": N,
        "pattern": "2:4",
    }
    return ops.sparse_linear(**{**arguments, **changes})


def test_the_arguments_are_good(packed):
    assert call(packed).shape == (2, N)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
def test_wrong_input_dtype(packed, dtype):
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 128\].*must be bfloat16, float16 or"):
        call(packed, torch.ones(2, K, dtype=dtype))


@pytest.mark.parametrize("k", [K - 8, K + 64, 0])
def test_wrong_number_of_inputs(packed, k):
    with pytest.raises(RuntimeError, match="last dimension must be 128"):
        call(packed, torch.ones(2, k).bfloat16())


def test_scalar_input(packed):
    with pytest.raises(RuntimeError, match="last dimension must be 128"):
        call(packed, torch.ones(()).bfloat16())


def test_wrong_out_features(packed):
    with pytest.raises(RuntimeError, match="out_features is 25"):
        call(packed, out_features=N + 1)


def test_wrong_bias(packed):
    with pytest.raises(RuntimeError, match="bias of shape"):
        call(packed, bias=torch.ones(N + 1).bfloat16())
    with pytest.raises(RuntimeError, match="bias of shape"):
        call(packed, bias=torch.ones(N))


def test_wrong_permutation(packed):
    outside = torch.arange(K, dtype=torch.int32)
    outside[3] = K
    negative = torch.arange(K, dtype=torch.int32)
    negative[3] = -1
    for bad, message in (
        (torch.arange(K), "int32"),
        (torch.arange(K - 1, dtype=torch.int32), "does not fit"),
        (outside, "input index 128"),
        (negative, "input index -1"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(packed, permutation=bad)


def test_scale_is_refused(packed):
    with pytest.raises(RuntimeError, match=r"scale is given: .* bfloat16 values have none"):
        call(packed, scale=torch.ones(N))


def test_truncated_blob(packed):
    for size in (0, 64, packed.packed.numel() - 1):
        with pytest.raises(RuntimeError, match="truncated or replaced"):
            call(packed, packed=packed.packed[:size].clone())


def test_unaligned_blob(packed):
    storage = torch.empty(packed.packed.numel() + 1, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="aligned"):
        call(packed, packed=storage[1:].copy_(packed.packed))


def test_missing_metadata(packed):
    for metadata in (None, packed.metadata[:3], packed.metadata.int()):
        with pytest.raises(RuntimeError, match="metadata must be"):
            call(packed, metadata=metadata)


@pytest.mark.parametrize("value", [-1, 0, 3, 17, 2**31, 2**40, 2**62, -(2**63)])
@pytest.mark.parametrize("field", range(6))
def test_corrupted_metadata(packed, field, value):
    metadata = packed.metadata.clone()
    metadata[field] = value
    if torch.equal(metadata, packed.metadata):
        pytest.skip("the value is the right one")
    if field == 1 and value == 0 and packed.metadata[5] == 0:
        pytest.skip("another instruction set with the same layout: a valid header")
    with pytest.raises(
        RuntimeError, match=r"layout version|instruction set|corrupted|truncated|out_f"
    ):
        call(packed, metadata=metadata)


def test_reference_refuses_bytes_of_a_kernel(packed):
    with pytest.raises(Exception, match="only a compiled kernel reads"):
        ops._reference_linear(
            torch.ones(1, K), packed.packed, packed.metadata, None, None, None, N, "2:4"
        )


def pack(layer, **changes):
    weights = layer.weights
    arguments = {
        "values": weights.values,
        "mask": weights.mask,
        "permutation": weights.permutation,
        "block_size": 64,
        "isa": UNDOES,
    }
    return torch.ops.permllm.cpu_pack(*{**arguments, **changes}.values())


@needs_undoing
def test_pack_refuses_wrong_tensors(layer):
    weights = layer.weights
    for changes, message in (
        ({"values": weights.values.float()}, "values of shape .* bfloat16 or int8"),
        ({"mask": weights.mask.bool()}, "mask of shape .* uint8"),
        ({"mask": weights.mask[:, :-1]}, "does not fit values"),
        ({"mask": weights.mask[:-1]}, "does not fit values"),
        ({"values": weights.values[0]}, "two dimensions"),
        ({"values": weights.values[:, :-2], "permutation": None}, "multiple of 8"),
        ({"values": weights.values[:0]}, "must be positive"),
        ({"permutation": weights.permutation[:-1]}, "does not fit 128 inputs"),
        ({"permutation": weights.permutation.int()}, "uint8"),
        ({"permutation": torch.zeros_like(weights.permutation)}, r"inputs 0\.\.63 is no bijection"),
        ({"permutation": weights.permutation + 64}, "no bijection"),
        ({"block_size": 128}, "cannot be undone"),
        ({"isa": "mmx"}, "mmx names no instruction set: it must be one of amx"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pack(layer, **changes)


@pytest.mark.parametrize(("row", "byte"), [(0, 0), (N - 1, 15), (11, 9)])
def test_pack_refuses_wrong_masks(layer, row, byte):
    mask = layer.weights.mask.clone()
    mask[row, byte] = 0xFF
    first = byte * 8
    with pytest.raises(RuntimeError, match=rf"row {row} keeps 8 of the inputs {first}\.\."):
        pack(layer, mask=mask, permutation=None)


@needs_undoing
def test_pack_takes_strided_tensors(layer):
    weights = layer.weights
    packed, _ = pack(layer)
    strided, _ = pack(
        layer,
        values=weights.values.t().contiguous().t(),
        mask=weights.mask.repeat(1, 2)[:, : K // 8],
        permutation=weights.permutation.repeat_interleave(2)[::2],
    )
    assert torch.equal(packed, strided)


def test_override_of_the_instruction_set(layer, monkeypatch):
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    assert CpuBackend().instruction_set == "portable"
    monkeypatch.setenv("PERMLLM_CPU_ISA", "sse9")
    with pytest.raises(
        RuntimeError, match="PERMLLM_CPU_ISA=sse9 names no instruction set: it must be one of"
    ):
        CpuBackend()


def test_too_many_dimensions(packed):
    x = torch.ones(*[1] * 63, K).bfloat16()
    assert call(packed, x).shape == (*[1] * 63, N)
    with pytest.raises(RuntimeError, match="65 dimensions, at most 64 are taken: flatten"):
        call(packed, x.unsqueeze(0))
