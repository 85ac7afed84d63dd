"""A head with a copy in 12 bits: with some numbers of tokens the weight itself is faster."""

import pytest
import torch
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from permllm_vllm.quantization import head
from tests.quantization.dense_heads import WORDS, assert_right, built, load, logits, weights

pytestmark = pytest.mark.usefixtures("on_rank", "twelve_bit_instruction_set")


def test_the_faster_of_both_multiplies(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(head, "copied_tokens", lambda weight: 2)
    load(layer := built(ParallelLMHead), weights())
    most = layer.quant_method.tokens
    for tokens in (1, 2, 3, most, most + 1):
        assert_right(logits(layer, tokens))
    assert calls == [3, most]


def test_a_bias_is_added_to_the_copy(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setattr(head, "copied_tokens", lambda weight: 2)
    load(layer := built(ParallelLMHead), weights())
    x = torch.ones(3, layer.weight.shape[1]).bfloat16()
    bias = torch.randn(WORDS).bfloat16()
    expected = x.double() @ layer.weight.double().T + bias.double()
    assert_right((layer.quant_method.apply(layer, x, bias), expected))
    assert calls == []


def test_only_amx_has_such_numbers(twelve_bit_instruction_set: str) -> None:
    """Of rows of at least 2048 inputs; everywhere else the copy has all that it can be used for."""
    found = {
        inputs: head.copied_tokens(torch.empty((64, inputs), dtype=torch.bfloat16))
        for inputs in (64, 1984, 2048, 8192)
    }
    some = 48 if twelve_bit_instruction_set == "amx" else found[64]
    assert found == {64: found[64], 1984: found[64], 2048: some, 8192: some}
    assert found[64] > 1 << 30
