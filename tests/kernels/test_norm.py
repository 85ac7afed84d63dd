"""The kernel of norms against float64, and its refusals."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_vllm import ops

pytestmark = pytest.mark.skipif(
    bool(ops.missing_reason) or not torch.ops.permllm.cpu_has_norm(),
    reason=ops.missing_reason or "this instruction set has no kernel for norms",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPSILON = 1e-5
FLOAT32 = 8 * torch.finfo(torch.float32).eps
"""What sums of squares, their root and the products lose in float32."""


def rms_norm(x: Tensor, weight: Tensor | None) -> Tensor:
    return torch.ops.permllm.rms_norm(x, weight, EPSILON)


def expected(x: Tensor, weight: Tensor | None, like: torch.dtype) -> Tensor:
    """One token after the other, in float64, but for the rounding before the weight."""
    rows = []
    for row in x.double().reshape(-1, x.shape[-1]).tolist():
        mean = math.fsum(value * value for value in row) / len(row)
        rows.append([value / math.sqrt(mean + EPSILON) for value in row])
    found = torch.tensor(rows, dtype=torch.float64).view(x.shape)
    if weight is None:
        return found
    rounded = found.to(like if weight.dtype == like else torch.float64)
    return rounded.double() * weight.double()


def assert_near(found: Tensor, exact: Tensor) -> None:
    """Two roundings to its dtype at most, either side of what lies between two, and of float32."""
    unit = 1.5 * torch.finfo(found.dtype).eps + FLOAT32
    smallest = torch.finfo(found.dtype).smallest_normal
    assert ((found.double() - exact).abs() <= unit * exact.abs() + smallest).all()


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


@given(
    tokens=st.integers(1, 5),
    inputs=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    weighted=st.sampled_from(["alike", "float32", "not"]),
    seed=st.integers(0, 1000),
)
def test_every_size_and_dtype(
    tokens: int, inputs: int, dtype: torch.dtype, weighted: str, seed: int
) -> None:
    x, residual = drawn(2, tokens, inputs, dtype=dtype, seed=seed)
    own = dtype if weighted == "alike" else torch.float32
    weight = None if weighted == "not" else drawn(inputs, dtype=own, seed=seed + 1)
    before = x.clone()
    found = rms_norm(x, weight)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    assert_near(found, expected(x, weight, dtype))

    total = x.float() + residual.float()
    added = residual.clone()
    torch.ops.permllm.add_rms_norm_(x, added, weight, EPSILON)
    assert torch.equal(added, total.to(dtype))
    assert_near(x, expected(total, weight, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_vllm_defines(dtype: torch.dtype) -> None:
    """In 16 bits, but for the few values that lie between two."""
    layernorm = pytest.importorskip("vllm.ir.ops.layernorm", reason="vLLM is not installed")
    for own in {dtype, torch.float32}:
        x, residual = drawn(2, 64, 2048, dtype=dtype, seed=0)
        weight = drawn(2048, dtype=own, seed=1)
        plain = layernorm.rms_norm.impls["native"].impl_fn(x, weight, EPSILON)
        both = layernorm.fused_add_rms_norm.impls["native"].impl_fn(x, residual, weight, EPSILON)
        found = rms_norm(x, weight)
        torch.ops.permllm.add_rms_norm_(x, residual, weight, EPSILON)
        assert torch.equal(residual, both[1])
        for one, other in ((found, plain), (x, both[0])):
            unit = 2 * torch.finfo(dtype).eps + FLOAT32
            torch.testing.assert_close(one, other, rtol=unit, atol=0)
            if dtype != torch.float32:
                assert (one != other).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_in_every_batch_and_with_every_thread(dtype: torch.dtype) -> None:
    x, weight = drawn(9, 72, dtype=dtype, seed=0), drawn(72, dtype=dtype, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = rms_norm(x, weight)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.stack([rms_norm(row, weight) for row in x]))
    assert torch.equal(together, rms_norm(x, weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    x = torch.ones(3, 40, dtype=dtype)
    x[0, 1], x[1, 39] = math.nan, math.inf
    found = rms_norm(x, torch.ones(40, dtype=dtype))
    assert found[0].isnan().all()
    assert found[1, 39].isnan()
    assert (found[1, :39] == 0).all()
    assert torch.allclose(found[2], torch.ones(40, dtype=dtype))


def test_opcheck() -> None:
    x, residual = drawn(2, 3, 32, dtype=torch.bfloat16, seed=0)
    for weight in (None, drawn(32, dtype=torch.bfloat16, seed=1)):
        torch.library.opcheck(torch.ops.permllm.rms_norm.default, (x, weight, EPSILON))
        torch.library.opcheck(
            torch.ops.permllm.add_rms_norm_.default, (x, residual, weight, EPSILON)
        )


def test_any_shape_and_strides() -> None:
    parts = drawn(4, 3, 96, dtype=torch.bfloat16, seed=0)
    heads = parts[..., 32:64]  # as those of queries in what one product gave
    weight = drawn(32, dtype=torch.bfloat16, seed=1)
    assert torch.equal(rms_norm(heads, weight), rms_norm(heads.contiguous(), weight))
    assert rms_norm(parts[:0], None).shape == (0, 3, 96)
    assert rms_norm(parts[..., :0], None).shape == (4, 3, 0)


def test_refusals() -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    weight = torch.ones(8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 8\] is not a CPU tensor of the right"):
        rms_norm(x.double(), None)
    for wrong in (weight[:4], weight.half(), weight.view(2, 4), torch.ones(16)[::2]):
        with pytest.raises(RuntimeError, match=r"weight of shape .* does not fit x of shape"):
            rms_norm(x, wrong)
    for wrong in (x.float(), x[:1], x.t().contiguous().t(), x.view(-1)):
        with pytest.raises(RuntimeError, match=r"residual of shape .* must be contiguous and"):
            torch.ops.permllm.add_rms_norm_(x, wrong, weight, EPSILON)
