"""The kernel of gated activations against float64, and its refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_vllm import ops

pytestmark = pytest.mark.skipif(bool(ops.missing_reason), reason=ops.missing_reason)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KERNELS = ("silu_and_mul", "gelu_tanh_and_mul")
FLOAT32 = torch.finfo(torch.float32).eps
VANISHED = 1e-34
"""More than a gate below -87 gives, where the exponential grows no further."""


def multiplied(kernel: str, x: Tensor) -> Tensor:
    operator: Callable[[Tensor], Tensor] = getattr(torch.ops.permllm, kernel)
    return operator(x)


def exponent(kernel: str, gate: float) -> float:
    """z of gate / (1 + exp(-z)): x / 2 * (1 + tanh(z / 2)) is that too, and cancels below 0."""
    if kernel == "silu_and_mul":
        return gate
    return 2 * math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)


def assert_near(kernel: str, found: Tensor, x: Tensor) -> None:
    """One output after the other, against float64.

    One rounding to its dtype, and those of float32: an exponential errs by as much as its exponent.
    """
    unit, smallest = torch.finfo(found.dtype).eps / 2, torch.finfo(found.dtype).smallest_normal
    for row, outputs in zip(x.double().tolist(), found.double().tolist(), strict=True):
        for gate, factor, output in zip(row, row[len(outputs) :], outputs, strict=False):
            z = exponent(kernel, gate)
            exact = gate / (1 + math.exp(-z)) * factor
            lost = unit + FLOAT32 * (8 + 2 * abs(z))
            assert abs(output - exact) <= lost * abs(exact) + smallest + VANISHED, (gate, factor)


def drawn(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=generator)).to(dtype)


@pytest.mark.parametrize("kernel", KERNELS)
@given(
    tokens=st.integers(1, 5),
    inputs=st.integers(1, 100),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_every_size_and_dtype(
    kernel: str, tokens: int, inputs: int, dtype: torch.dtype, seed: int
) -> None:
    x = drawn(tokens, 2 * inputs, dtype=dtype, seed=seed)
    before = x.clone()
    found = multiplied(kernel, x)
    assert found.dtype == dtype
    assert found.shape == (tokens, inputs)
    assert torch.equal(x, before)
    assert_near(kernel, found, x)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_what_vllm_defines(dtype: torch.dtype) -> None:
    """But for the rounding of the activated gate, which the kernel leaves out."""
    functional = torch.nn.functional
    x = drawn(64, 2048, dtype=dtype, seed=0)
    gate, factor = x.chunk(2, dim=-1)
    for kernel, activated in (
        ("silu_and_mul", functional.silu(gate)),
        ("gelu_tanh_and_mul", functional.gelu(gate, approximate="tanh")),
    ):
        plain = (activated * factor).double()
        # PyTorch takes 1 - tanh of a large negative gate, and rounds to subnormal numbers.
        cancelled = 2e-7 * (gate * factor).double().abs()
        subnormal = torch.finfo(dtype).tiny * torch.finfo(dtype).eps * (factor.double().abs() + 1)
        bound = (1.5 * torch.finfo(dtype).eps + 16 * FLOAT32) * plain.abs() + cancelled + subnormal
        assert ((multiplied(kernel, x).double() - plain).abs() <= bound).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_the_same_in_every_batch_and_with_every_thread(
    kernel: str, dtype: torch.dtype
) -> None:
    x = drawn(9, 144, dtype=dtype, seed=0)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = multiplied(kernel, x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, torch.stack([multiplied(kernel, row) for row in x]))
    assert torch.equal(together, multiplied(kernel, x))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates(kernel: str, dtype: torch.dtype) -> None:
    """They pass, or are zero; what is no number stays none."""
    gates = [100.0, 3e4, math.inf, -100.0, -3e4, -math.inf, math.nan, 0.0]
    x = torch.tensor([gates + [1.0] * len(gates)], dtype=dtype)
    found = multiplied(kernel, x)[0].tolist()
    assert found[:3] == x[0, :3].tolist()
    assert all(abs(one) < 1e-30 for one in found[3:6])
    assert math.isnan(found[6])
    assert found[7] == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_opcheck(kernel: str) -> None:
    operator = getattr(torch.ops.permllm, kernel).default
    torch.library.opcheck(operator, (drawn(3, 32, dtype=torch.bfloat16, seed=0),))


@pytest.mark.parametrize("kernel", KERNELS)
def test_any_shape_and_strides(kernel: str) -> None:
    parts = drawn(4, 3, 96, dtype=torch.bfloat16, seed=0)
    part = parts[..., 32:64]
    assert torch.equal(multiplied(kernel, part), multiplied(kernel, part.contiguous()))
    assert multiplied(kernel, parts[:0]).shape == (0, 3, 48)
    assert multiplied(kernel, parts[..., :0]).shape == (4, 3, 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_refusals(kernel: str) -> None:
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match=r"x of shape \[2, 8\] is not a CPU tensor of the right"):
        multiplied(kernel, x.double())
    for wrong in (x[:, :7], x[0, 0]):
        with pytest.raises(RuntimeError, match="has no gate and no factor in its last dimension"):
            multiplied(kernel, wrong)
