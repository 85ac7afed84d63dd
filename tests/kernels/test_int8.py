"""int8 values: every kernel against exact arithmetic with the int8 weight, and the fallback."""

import pytest
import torch

from benchmarks.shapes import random_layer, to_int8
from permllm_vllm import ops
from permllm_vllm.backends import CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.checkpoint.pattern import Pattern
from tests.kernels.cases import GROUPS, Case, cases
from tests.kernels.test_cpu import exact, run

# Of the instruction sets that round x to integers: W8A16 (avx2 W8A14) up to here, W8A8 beyond.
SPLIT_TOKENS = {"amx": 16} | dict.fromkeys(
    ("zen5", "avx512_bf16", "avx512_vbmi2", "avx512_vnni", "avx2_vnni", "avx2"), 2
)
INTEGERS = tuple(SPLIT_TOKENS)
TOKENS = (1, 2, 3, 4, 5, 6, 8, 10, 11, 15, 16, 17, 31, 40, 64, 100, 257, 300)
LARGE_TOKENS = (1, 2, 8, 33, 300)
ROUNDING = {torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of y, at most, as a share
TOLERANCE_SPLIT, TOLERANCE = 3e-3, 1.2e-2  # relative Frobenius error, W8A16 or exact x, and W8A8


@pytest.fixture
def int8_isa(isa):
    """Instruction sets with a kernel for int8 values."""
    if not torch.ops.permllm.cpu_packs_int8(isa):
        pytest.skip(f"{isa} multiplies int8 values as bfloat16")
    return isa


def has_8_bits(isa: str, m: int) -> bool:
    """Whether the activations of m tokens are rounded to 8 bits."""
    return m > SPLIT_TOKENS.get(isa, m)


def steps(isa, x):
    """The distance of neighbouring quantized activations, at most: float64 [tokens, 1]."""
    largest = 127 if has_8_bits(isa, len(x)) else 32767
    if isa == "avx2":  # 14 bits, and fewer where sums have no room for them
        largest = min(largest, 8191, 2**31 // 128 // (x.shape[1] // 2) - 1)
    return x.double().abs().amax(dim=-1, keepdim=True) / largest


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("case", list(cases()), ids=str)
def test_matches_float64(case: Case, int8_isa: str, dtype: torch.dtype) -> None:
    layer = to_int8(case.layer())
    for m in LARGE_TOKENS if case.n * case.k > 60_000 else TOKENS:
        x = torch.randn(m, case.k, generator=torch.Generator().manual_seed(m)).to(dtype)
        y, reference = run(layer, int8_isa, x), exact(x, layer)
        assert y.dtype == dtype
        assert y.shape == reference.shape
        if y.numel() >= 256 and case.k >= 64:
            error = (y.double() - reference).norm() / reference.norm()
            assert error <= (TOLERANCE if has_8_bits(int8_isa, m) else TOLERANCE_SPLIT)
        # No activation is off by more than half a step, no output by more than its rounding.
        weights = layer.dense.double().abs().sum(dim=1)
        bound = 0.501 * steps(int8_isa, x) * weights + ROUNDING[dtype] * reference.abs() + 1e-6
        assert ((y.double() - reference).abs() <= bound).all()


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("m", [4, 10, 24, 64])
def test_integer_activations_are_exact(int8_isa, m, dtype):
    """Integers up to 127 quantize to themselves: the sums are those of integer arithmetic."""
    if m <= SPLIT_TOKENS.get(int8_isa, 0):
        pytest.skip(f"{int8_isa} rounds {m} tokens to more bits: 127 is no integer there")
    generator = torch.Generator().manual_seed(m)
    n, k = 43, 200
    layer = to_int8(random_layer(n, k, permuted=False))
    layer.weights.values.random_(-128, 128, generator=generator)
    scale = torch.rand(n, generator=generator) + 0.5
    weights = CheckpointWeights(**{**vars(layer.weights), "scale": scale})
    x = torch.randint(-127, 128, (m, k), generator=generator)
    x[:, 3] = 127
    dense = ReferenceBackend(torch.float64).pack(
        CheckpointWeights(**{**vars(weights), "scale": None})
    )
    sums = (x.double() @ dense.packed.t()).float()
    packed = CpuBackend(int8_isa).pack(weights)
    y = ops.sparse_linear(
        x.to(dtype), packed.packed, packed.metadata, None, packed.scale, None, n, "2:4"
    )
    assert torch.equal(y, (sums * scale).to(dtype))


@pytest.mark.parametrize("m", [1, 5, 11, 33])
def test_any_bias_comes_out_as_it_went_in(int8_isa, m):
    layer = to_int8(random_layer(24, 128, permuted=False))
    bias = torch.randn(24).bfloat16()
    special = (torch.nan, torch.inf, -torch.inf, torch.finfo(torch.bfloat16).max, -0.0, 2.0**-126)
    bias[4 : 4 + len(special)] = torch.tensor(special)
    packed = CpuBackend(int8_isa).pack(layer.weights)
    x = torch.zeros(m, 128, dtype=torch.bfloat16)
    y = ops.sparse_linear(x, packed.packed, packed.metadata, None, packed.scale, bias, 24, "2:4")
    assert torch.equal(y.nan_to_num(nan=7.0), bias.nan_to_num(nan=7.0).expand(m, 24))
    assert y[:, 4].isnan().all()


@pytest.mark.parametrize("m", [1, 5, 17])
@pytest.mark.parametrize("value", [-128, 127])
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_largest_sums_do_not_overflow(int8_isa, m, value, sign):
    n, k = 3, 1 << 17
    weights = CheckpointWeights(
        values=torch.full((n, k // 2), value, dtype=torch.int8),
        mask=torch.full((n, k // 8), 0x33, dtype=torch.uint8),
        permutation=None,
        scale=torch.full((n,), 2.0**-20),
        pattern=Pattern(2, 4),
        block_size=64,
    )
    packed = CpuBackend(int8_isa).pack(weights)
    x = torch.full((m, k), sign).bfloat16()
    y = ops.sparse_linear(x, packed.packed, packed.metadata, None, packed.scale, None, n, "2:4")
    expected = torch.full((m, n), sign * value * k / 2 * 2.0**-20).bfloat16()
    assert torch.equal(y, expected)


def test_more_inputs_are_multiplied_as_bfloat16(int8_isa):
    k = (1 << 17) + 64
    weights = CheckpointWeights(
        values=torch.ones(1, k // 2, dtype=torch.int8),
        mask=torch.full((1, k // 8), 0x33, dtype=torch.uint8),
        permutation=None,
        scale=torch.ones(1),
        pattern=Pattern(2, 4),
        block_size=64,
    )
    assert CpuBackend(int8_isa).pack(weights).scale is None


@pytest.mark.parametrize("m", [1, 3, 16, 21])
def test_tokens_have_their_own_scale(int8_isa, m):
    """Zeros, the smallest numbers and infinities disturb no other token."""
    layer = to_int8(random_layer(20, 136, permuted=False, bias=True))
    x = torch.randn(m, 136).bfloat16()
    y = run(layer, int8_isa, x)
    for special in (0.0, 2.0**-130, 2.0**-110, float("inf"), float("nan")):
        changed = x.clone()
        changed[0] = special
        result = run(layer, int8_isa, changed)
        assert torch.equal(result[1:], y[1:])
        if abs(special) < 1:
            assert torch.equal(result[0], layer.bias)
        else:
            assert not result[0].isfinite().any()


def test_deterministic_with_any_number_of_threads(int8_isa):
    layer = to_int8(random_layer(72, 2752))
    for m in (1, 6, 12, 20, 70, 270):
        x = torch.randn(m, 2752).bfloat16()
        expected = run(layer, int8_isa, x)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            assert torch.equal(run(layer, int8_isa, x), expected)


@pytest.mark.parametrize(("n", "k"), [(8, 64), (13, 72), (35, 200)])
def test_the_sums_of_rows_stand_behind_the_blocks(int8_isa, n, k):
    """For kernels that shift x and subtract the shift times the sum."""
    layer = to_int8(random_layer(n, k, permuted=k % 64 == 0))
    packed = CpuBackend(int8_isa).pack(layer.weights).packed
    rows = 16 if int8_isa in ("amx", *GROUPS) else 8
    groups = -(-n // rows)
    blocks = groups * -(-k // 64) * rows * (8 + 32)
    sums = packed[blocks : blocks + groups * rows * 4].view(torch.int32)
    assert torch.equal(sums[:n].long(), layer.weights.values.long().sum(dim=1))
    assert not sums[n:].any()


def test_packed_bytes(int8_isa):
    """Resident bytes are at most 0.35 of the dense bfloat16 weight."""
    packed = CpuBackend(int8_isa).pack(to_int8(random_layer(512, 1024)).weights)
    assert packed.scale is not None
    bytes_packed = packed.packed.numel() + packed.scale.numel() * 4
    assert bytes_packed <= 0.35 * 512 * 1024 * 2


def test_wrong_scales(int8_isa):
    layer = to_int8(random_layer(24, 128))
    packed = CpuBackend(int8_isa).pack(layer.weights)
    x = torch.randn(2, 128).bfloat16()
    for scale, message in (
        (None, "scale is missing: packed int8 values need"),
        (packed.scale.double(), "scale of shape .* must be float32"),
        (packed.scale[:-1], r"scale of shape \[23\] does not fit 24 outputs"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sparse_linear(x, packed.packed, packed.metadata, None, scale, None, 24, "2:4")
