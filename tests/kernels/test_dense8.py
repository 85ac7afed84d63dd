"""Dense rows rounded to int8: every kernel against exact arithmetic with the rounded rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_vllm import ops
from permllm_vllm.backends.cpu import CpuBackend
from permllm_vllm.backends.rounded import SMALLEST, round_rows
from permllm_vllm.backends.weights import PackedWeights
from tests.kernels.test_int8 import TOLERANCE, TOLERANCE_SPLIT, has_8_bits

SHAPES = ((1, 8), (7, 64), (19, 72), (45, 576), (70, 1096), (33, 2048), (45, 4168))
TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 17, 29, 32, 33, 64, 70, 257, 300)


MOST_INPUTS = 1 << 16


@pytest.fixture
def dense8_isa(isa: str) -> str:
    """Instruction sets with a kernel for dense rows of int8 values."""
    if isa == "portable":
        pytest.skip(f"{isa} has no kernel for dense rows")
    return isa


def rounds_x_to_8_bits(isa: str, m: int) -> bool:
    """avx2 has kernels of its own for dense rows, of 16 bits where sums have room."""
    return isa != "avx2" and has_8_bits(isa, m)


def drawn(rows: int, inputs: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, inputs, generator=generator).bfloat16()


def packed_on(isa: str, weight: Tensor) -> PackedWeights:
    packed = CpuBackend(isa).round_dense(weight)
    assert packed is not None
    return packed


def multiply(x: Tensor, packed: PackedWeights, n: int, bias: Tensor | None = None) -> Tensor:
    return ops.sparse_linear(
        x, packed.packed, packed.metadata, None, packed.scale, bias, n, "dense"
    )


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_matches_float64(dense8_isa: str, n: int, k: int, dtype: torch.dtype) -> None:
    weight = drawn(n, k, 1)
    values, scale = round_rows(weight)
    rounded = values.double() * scale.double()[:, None]
    packed = packed_on(dense8_isa, weight)
    bias = drawn(1, n, 2)[0].to(dtype)
    for m in TOKENS:
        x = drawn(m, k, m).to(dtype)
        found, exact = multiply(x, packed, n, bias).double(), x.double() @ rounded.T + bias.double()
        assert found.shape == (m, n)
        if found.numel() >= 64 and k >= 64:
            limit = TOLERANCE if rounds_x_to_8_bits(dense8_isa, m) else TOLERANCE_SPLIT
            assert (found - exact).norm() <= limit * exact.norm()


@pytest.mark.parametrize("m", TOKENS)
def test_integers_are_exact(dense8_isa: str, m: int) -> None:
    """Weights that rounding leaves as they are, and activations where they have 8 bits."""
    generator = torch.Generator().manual_seed(m)
    weight = torch.randint(-7, 8, (75, 192), generator=generator)
    weight[:, 5] = 127
    x = torch.randint(-3, 4, (m, 192), generator=generator)
    x[:, 7] = 127
    x[:, 5] = 0
    weight[:, 7] = 0
    packed = packed_on(dense8_isa, weight.bfloat16())
    found, exact = multiply(x.bfloat16(), packed, 75), x.double() @ weight.double().T
    if rounds_x_to_8_bits(dense8_isa, m):
        assert torch.equal(found, exact.bfloat16())
    else:
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=0.1)


def test_padding_counts_for_nothing(dense8_isa: str) -> None:
    """Rows of a group past the last, and inputs of a block past the last."""
    weight = torch.full((9, 72), 1.0).bfloat16()
    packed = packed_on(dense8_isa, weight)
    for m in TOKENS:
        assert torch.equal(
            multiply(torch.ones(m, 72).bfloat16(), packed, 9), torch.full((m, 9), 72.0)
        )


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(dense8_isa: str, threads: int) -> None:
    packed = packed_on(dense8_isa, drawn(1000, 576, 1))
    for m in TOKENS:
        x = drawn(m, 576, m)
        torch.set_num_threads(1)
        alone = multiply(x, packed, 1000)
        torch.set_num_threads(threads)
        assert torch.equal(multiply(x, packed, 1000), alone)


def test_largest_sums_do_not_overflow(dense8_isa: str) -> None:
    """As many inputs as there may be, every byte of which is as large as it can be."""
    weight = torch.ones(8, MOST_INPUTS).bfloat16()
    packed = packed_on(dense8_isa, weight)
    for m in (1, 2, 3, 17):
        x = torch.full((m, MOST_INPUTS), 255 / 32767).bfloat16()
        x[:, 0] = 1
        found, exact = multiply(x, packed, 8).double(), x.double() @ weight.double().T
        assert (found - exact).norm() <= TOLERANCE * exact.norm()
        ones = multiply(torch.ones_like(x), packed, 8)
        assert torch.equal(ones, torch.full_like(ones, MOST_INPUTS))


def test_a_row_of_zeros(dense8_isa: str) -> None:
    weight = drawn(20, 64, 1)
    weight[3] = 0
    found = multiply(drawn(5, 64, 2), packed_on(dense8_isa, weight), 20)
    assert torch.equal(found[:, 3], torch.zeros(5))
    assert found.isfinite().all()


def test_what_has_no_copy(isa: str) -> None:
    backend = CpuBackend(isa)
    if isa == "portable":
        assert backend.round_dense(drawn(4, 64, 0)) is None
    assert backend.round_dense(drawn(4, 60, 0)) is None
    assert backend.round_dense(torch.zeros(1, MOST_INPUTS + 8)) is None
    if isa != "portable":
        assert backend.round_dense(torch.ones(1, MOST_INPUTS)) is not None


def test_float32_has_no_kernel(dense8_isa: str) -> None:
    packed = packed_on(dense8_isa, drawn(8, 64, 0))
    written = f"x is float32, packed was written for .* {dense8_isa}"
    with pytest.raises(RuntimeError, match=f"{written}.* float16: convert x to one of them"):
        multiply(drawn(3, 64, 0).float(), packed, 8)


def test_a_scale_must_be_given(dense8_isa: str) -> None:
    packed = packed_on(dense8_isa, drawn(8, 64, 0))
    with pytest.raises(RuntimeError, match="scale is missing: packed int8 values need"):
        torch.ops.permllm.sparse_linear(
            drawn(1, 64, 0), packed.packed, packed.metadata, None, None, None, 8, "dense"
        )


@given(
    rows=st.integers(1, 40),
    inputs=st.integers(1, 70),
    power=st.integers(-130, 100),
    seed=st.integers(0, 1000),
)
def test_rounding_is_off_by_half_a_step(rows: int, inputs: int, power: int, seed: int) -> None:
    weight = drawn(rows, inputs, seed).mul_(2.0**power)
    weight[::3] = 0
    before = weight.clone()
    values, scale = round_rows(weight)
    assert torch.equal(weight, before)
    assert (values.dtype, scale.dtype) == (torch.int8, torch.float32)
    assert scale.isfinite().all()
    assert values.abs().max() <= 127
    difference = values.double() * scale.double()[:, None] - weight.double()
    assert (difference.abs() <= 0.5001 * scale.double()[:, None]).all()
    largest = weight.abs().amax(1) >= SMALLEST
    assert (values.abs().amax(1)[largest] == 127).all()


def test_a_weight_of_float32_stays_as_it_is() -> None:
    weight = drawn(5, 16, 0).float()
    before = weight.clone()
    round_rows(weight)
    assert torch.equal(weight, before)
