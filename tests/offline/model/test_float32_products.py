"""Linear layers of 16 bits in float32, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from permllm_offline.model import float32_products
from permllm_offline.model.float32_products import products_in_float32, slow_dtypes

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both types are slow, and a layer has several chunks."""
    monkeypatch.setattr(float32_products, "slow_dtypes", lambda: frozenset(DTYPES))
    monkeypatch.setattr(float32_products, "CHUNK_ELEMENTS", 100)


def drawn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.requires_grad_()


def assert_rounded(found: Tensor | None, exact: Tensor | None) -> None:
    """Off by one rounding to 16 bits, and those of float32 sums."""
    assert found is not None
    assert exact is not None
    eps = torch.finfo(found.dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=eps / 2, atol=1e-5)


@given(
    tokens=st.integers(0, 9),
    inputs=st.integers(1, 130),
    outputs=st.integers(1, 40),
    biased=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_products_and_gradients(
    tokens: int, inputs: int, outputs: int, biased: bool, dtype: torch.dtype
) -> None:
    given = [drawn(tokens, inputs, dtype=dtype), drawn(outputs, inputs, dtype=dtype, seed=1)]
    if biased:
        given.append(drawn(outputs, dtype=dtype, seed=2))
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    of_y = drawn(tokens, outputs, dtype=dtype, seed=3).detach()
    with products_in_float32():
        found = functional.linear(*given)
    expected = functional.linear(*exact)
    assert found.dtype == dtype
    assert_rounded(found, expected)
    found.backward(of_y)
    expected.backward(of_y.double())
    for one, other in zip(given, exact, strict=True):
        assert_rounded(one.grad, other.grad)


def test_a_module_of_any_dimensions() -> None:
    layer = torch.nn.Linear(48, 20, dtype=torch.bfloat16)
    x = drawn(2, 3, 48).detach()
    with products_in_float32():
        found = layer(input=x)
    assert found.shape == (2, 3, 20)
    assert_rounded(found, layer.double()(x.double()))


def test_what_the_cpu_multiplies_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products._Linear, "apply", lambda *_: pytest.fail("was taken"))
    x, weight = torch.ones(2, 8), torch.ones(4, 8)
    with products_in_float32():
        assert torch.equal(functional.linear(x, weight), x @ weight.t())
        meta = functional.linear(x.bfloat16().to("meta"), weight.bfloat16().to("meta"))
        assert meta.shape == (2, 4)
    monkeypatch.setattr(float32_products, "slow_dtypes", lambda: frozenset())
    with products_in_float32():
        functional.linear(x.bfloat16(), weight.bfloat16())


def test_dtypes_that_do_not_fit_are_refused_as_ever() -> None:
    with products_in_float32(), pytest.raises(RuntimeError, match="dtype"):
        functional.linear(torch.ones(2, 8), torch.ones(4, 8).bfloat16())


def test_this_cpu_is_asked() -> None:
    assert slow_dtypes() <= set(DTYPES)
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert (torch.bfloat16 in slow_dtypes()) is not supported
