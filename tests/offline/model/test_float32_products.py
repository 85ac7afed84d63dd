"""Linear layers of 16 bits in float32, against float64."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from permllm_offline.model import float32_products
from permllm_offline.model.float32_products import (
    batched_product,
    product,
    products_in_float32,
)
from permllm_offline.model.recomputation import recomputed
from permllm_offline.text.evaluation import perplexity
from tests.offline.tiny_models import tiny_model

DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both types are slow, and a layer has several chunks."""
    monkeypatch.setattr(float32_products, "slow_dtypes", lambda: frozenset(DTYPES))
    monkeypatch.setattr(float32_products, "CHUNK_ELEMENTS", 100)
    monkeypatch.setattr(float32_products, "LEAST_TOKENS", 1)


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


def test_only_the_threads_within_take_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, original = noted(monkeypatch), functional.linear
    x, weight = drawn(4, 16).detach(), drawn(8, 16).detach()
    with ThreadPoolExecutor(1) as other, products_in_float32():
        other.submit(functional.linear, x, weight).result()
        assert not calls
        with products_in_float32():
            functional.linear(x, weight)
        functional.linear(x, weight)
        assert len(calls) == 2
    assert functional.linear is original


def test_dtypes_that_do_not_fit_are_refused_as_ever() -> None:
    with products_in_float32(), pytest.raises(RuntimeError, match="dtype"):
        functional.linear(torch.ones(2, 8), torch.ones(4, 8).bfloat16())


@pytest.mark.parametrize(("tokens", "taken"), [(3, False), (4, True)])
def test_few_tokens_are_left_alone(
    tokens: int, taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(float32_products, "LEAST_TOKENS", 4)
    calls = noted(monkeypatch)
    with products_in_float32():
        functional.linear(drawn(tokens, 16), drawn(8, 16))
    assert len(calls) == taken


def noted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of every layer that takes the other way."""
    calls: list[int] = []
    original = float32_products._linear

    def noting(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(len(weight))
        return original(input, weight, bias)

    monkeypatch.setattr(float32_products, "_linear", noting)
    return calls


@pytest.mark.parametrize("outputs", [24, 16])
@pytest.mark.parametrize("biased", [True, False])
def test_recomputed_activations_are_those_of_the_first_time(
    outputs: int, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the same layer, square or not: the backward pass is outside, and computes it again."""
    calls = noted(monkeypatch)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, outputs, bias=biased), torch.nn.SiLU(), torch.nn.Linear(outputs, 16)
    ).bfloat16()
    x, gradients = drawn(5, 16), []
    for layers in ([], [model]):
        model.zero_grad()
        with recomputed(layers), products_in_float32():
            model(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)
    assert len(calls) == 2 + 4
    with recomputed([model]):  # outside, both times
        model(x).sum().backward()
    assert len(calls) == 6


@given(rows=st.integers(0, 9), inner=st.integers(1, 40), columns=st.integers(1, 30))
def test_a_product_of_matrices(rows: int, inner: int, columns: int) -> None:
    a, b = drawn(2, rows, inner).detach(), drawn(columns, inner, seed=1).detach().t()
    assert_rounded(product(a, b), a.double() @ b.double())
    assert torch.equal(product(a.double(), b.double()), a.double() @ b.double())


def test_products_of_many_matrices_stay_in_float32() -> None:
    a, b = drawn(3, 5, 40).detach(), drawn(3, 40, 4, seed=1).detach()
    found = batched_product(a, b)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, a.float() @ b.float())
    assert torch.equal(batched_product(a.double(), b.double()), a.double() @ b.double())


def test_perplexity_is_taken_the_faster_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = noted(monkeypatch)
    model = tiny_model("llama").bfloat16()
    assert perplexity(model, torch.randint(2, 40, (2, 12))) > 1
    assert calls
