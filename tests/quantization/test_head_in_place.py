"""A head with a copy in 12 bits: with some numbers of tokens the weight itself is faster."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from permllm_vllm.backends.cpu import instruction_sets
from permllm_vllm.quantization import head
from tests.kernels.cases import TWELVE_BITS
from tests.quantization.dense_heads import WORDS, assert_right, built, load, logits, weights


@pytest.fixture(autouse=True)
def one_rank(on_rank: Callable[[int, int], None]) -> None:
    on_rank(0, 1)


@pytest.fixture(autouse=True)
def instruction_set(monkeypatch: pytest.MonkeyPatch) -> str:
    """One with kernels for both."""
    found = [name for name in instruction_sets() if name in TWELVE_BITS]
    if not found:
        pytest.skip("this CPU or build has no kernel for 12 bits")
    monkeypatch.setenv("PERMLLM_CPU_ISA", found[0])
    return found[0]


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call that the kernel for the weight itself took."""
    found: list[int] = []
    kernel = head._head_linear

    def noting(x: Tensor, weight: Tensor) -> Tensor:
        found.append(len(x))
        return kernel(x, weight)

    monkeypatch.setattr(head, "_head_linear", noting)
    return found


def test_the_faster_of_both_multiplies(
    monkeypatch: pytest.MonkeyPatch, in_place: list[int]
) -> None:
    monkeypatch.setattr(head, "copied_tokens", lambda weight: 2)
    load(layer := built(ParallelLMHead), weights())
    most = layer.quant_method.tokens
    for tokens in (1, 2, 3, most, most + 1):
        assert_right(logits(layer, tokens))
    assert in_place == [3, most]


def test_a_bias_is_added_to_the_copy(monkeypatch: pytest.MonkeyPatch, in_place: list[int]) -> None:
    monkeypatch.setattr(head, "copied_tokens", lambda weight: 2)
    load(layer := built(ParallelLMHead), weights())
    x = torch.ones(3, layer.weight.shape[1]).bfloat16()
    bias = torch.randn(WORDS).bfloat16()
    expected = x.double() @ layer.weight.double().T + bias.double()
    assert_right((layer.quant_method.apply(layer, x, bias), expected))
    assert in_place == []


def test_only_amx_has_such_numbers(instruction_set: str) -> None:
    """Of rows of at least 2048 inputs; everywhere else the copy has all that it can be used for."""
    found = {
        inputs: head.copied_tokens(torch.empty((64, inputs), dtype=torch.bfloat16))
        for inputs in (64, 1984, 2048, 8192)
    }
    some = 48 if instruction_set == "amx" else found[64]
    assert found == {64: found[64], 1984: found[64], 2048: some, 8192: some}
    assert found[64] > 1 << 30
