"""Embeddings and the output head in vLLM's own layers: who multiplies, and what is kept.

A copy in 12 bits is tested last; before that the kernels that read the weight where it stands.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
    record_metadata_for_reloading,
)
from vllm.model_executor.model_loader.weight_tying import maybe_retie_word_embeddings

from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.quantization import head
from permllm_vllm.quantization.head import (
    COPY,
    PACKED,
    HeadMethod,
    adopt_heads,
    can_round,
    head_tokens,
)
from permllm_vllm.quantization.options import ServingOptions
from tests.quantization.dense_heads import (
    CHANNELS,
    MOST,
    TAKES_ANY,
    WEIGHT,
    WORDS,
    assert_right,
    built,
    load,
    logits,
    may_lie_in_huge_pages,
    needs_half,
    needs_kernel,
    needs_limit,
    needs_rounding,
    weights,
)
from tests.quantization.sparse_modules import config


@pytest.fixture(autouse=True)
def one_rank(on_rank: Callable[[int, int], None]) -> None:
    pass


pack_dense = CpuBackend.pack_dense


@pytest.fixture(autouse=True)
def in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuBackend, "pack_dense", lambda *_: None)


@pytest.fixture
def twelve_bits(
    monkeypatch: pytest.MonkeyPatch, in_place: None, twelve_bit_instruction_set: str
) -> None:
    monkeypatch.setattr(CpuBackend, "pack_dense", pack_dense)


@needs_limit
def test_few_tokens_take_the_kernel_and_more_are_packed_for(calls: list[int]) -> None:
    layer = built(ParallelLMHead)
    load(layer, weights())
    assert may_lie_in_huge_pages(layer.weight.data_ptr())
    assert_right(logits(layer, 1))
    assert_right(logits(layer, MOST))
    assert calls == [1, MOST]
    assert PACKED not in layer.__dict__
    assert_right(logits(layer, MOST + 1))
    assert calls == [1, MOST]
    packed = layer.__dict__[PACKED]
    assert_right(logits(layer, MOST + 2))
    assert layer.__dict__[PACKED] is packed


@pytest.mark.skipif(not TAKES_ANY, reason="no kernel for any number of tokens here")
def test_any_number_of_tokens_takes_the_kernel(calls: list[int]) -> None:
    layer = built(ParallelLMHead)
    load(layer, weights())
    assert may_lie_in_huge_pages(layer.weight.data_ptr())
    for tokens in (1, MOST, 300):
        assert_right(logits(layer, tokens))
    assert calls == [1, MOST, 300]
    assert PACKED not in layer.__dict__


@needs_kernel
def test_an_embedding_that_is_no_head_is_never_packed() -> None:
    layer = built(VocabParallelEmbedding)
    load(layer, weights())
    assert torch.equal(layer(torch.tensor([3, 0, 8191])), weights()[[3, 0, 8191]])
    assert PACKED not in layer.__dict__


@needs_kernel
def test_a_tied_head_reads_the_embedding(calls: list[int]) -> None:
    embedding = built(VocabParallelEmbedding)
    tied = built(ParallelLMHead).tie_weights(embedding)
    load(embedding, weights())
    tied.quant_method.process_weights_after_loading(tied)
    assert tied.weight.data_ptr() == embedding.weight.data_ptr()
    assert_right(logits(tied, 2))
    assert torch.equal(tied.weight.data, weights())
    assert calls == [2]


@needs_kernel
def test_a_bias_is_left_to_vllm(calls: list[int]) -> None:
    layer = built(ParallelLMHead)
    load(layer, weights())
    x = torch.ones(1, CHANNELS).bfloat16()
    with_bias = layer.quant_method.apply(layer, x, torch.ones(WORDS).bfloat16())
    without = layer.quant_method.apply(layer, x)
    torch.testing.assert_close(with_bias, without + 1, rtol=1e-2, atol=1e-1)
    assert calls == [1]


@needs_kernel
def test_new_weights_are_packed_anew() -> None:
    layer = built(ParallelLMHead)
    record_metadata_for_reloading(layer)
    load(layer, weights())
    logits(layer, MOST + 1)
    address = layer.weight.data_ptr()
    initialize_layerwise_reload(layer)
    layer.weight.weight_loader(layer.weight, weights(seed=5))
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
    assert torch.equal(layer.weight.data, weights(seed=5))
    assert layer.weight.data_ptr() == address
    for tokens in (1, MOST + 1):
        assert_right(logits(layer, tokens))


@needs_half
def test_float16_is_never_packed(calls: list[int]) -> None:
    """vLLM multiplies it as slowly with any number of tokens."""
    layer = built(ParallelLMHead, torch.float16)
    load(layer, weights(dtype=torch.float16))
    for tokens in (1, 3 * MOST):
        assert_right(logits(layer, tokens, torch.float16))
    assert PACKED not in layer.__dict__
    assert calls == [1, 3 * MOST]


def test_other_types_are_left_to_vllm(calls: list[int]) -> None:
    layer = built(ParallelLMHead, torch.float32)
    load(layer, weights(dtype=torch.float32))
    assert PACKED in layer.__dict__
    assert_right(logits(layer, 1, torch.float32))
    assert calls == []


def test_without_a_kernel_vllm_packs(monkeypatch: pytest.MonkeyPatch, calls: list[int]) -> None:
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    assert head_tokens(WEIGHT) == 0
    layer = built(ParallelLMHead)
    load(layer, weights())
    assert PACKED in layer.__dict__
    assert_right(logits(layer, 1))
    assert calls == []


def test_any_number_of_tokens_meets_a_copy_in_twelve_bits(
    twelve_bits: None, calls: list[int]
) -> None:
    load(layer := built(ParallelLMHead), weights())
    copy = layer.__dict__[COPY]  # before vLLM measures how much memory the KV cache can have
    for tokens in (1, 8, 48, 49, 64, 65):
        assert_right(logits(layer, tokens))
    assert layer.__dict__[COPY] is copy
    assert copy.packed.nbytes < 0.77 * layer.weight.nbytes
    assert PACKED not in layer.__dict__
    assert calls == []
    assert torch.equal(layer.weight.data, weights())


def test_a_bias_is_added_to_the_copy(twelve_bits: None) -> None:
    layer = built(ParallelLMHead)
    load(layer, weights())
    x, bias = torch.ones(3, CHANNELS).bfloat16(), torch.randn(WORDS).bfloat16()
    expected = x.double() @ layer.weight.double().T + bias.double()
    assert_right((layer.quant_method.apply(layer, x, bias), expected))
    assert PACKED not in layer.__dict__


def test_an_embedding_that_is_no_head_has_no_copy(twelve_bits: None) -> None:
    layer = built(VocabParallelEmbedding)
    load(layer, weights())
    assert torch.equal(layer(torch.tensor([3, 0, 8191])), weights()[[3, 0, 8191]])
    assert COPY not in layer.__dict__


def test_a_weight_that_does_not_fit_is_read_in_place(twelve_bits: None, calls: list[int]) -> None:
    """Where too many values are tiny beside the largest of their row."""
    layer = built(ParallelLMHead)
    load(layer, weights() * 2.0 ** torch.arange(CHANNELS).remainder(40).neg().bfloat16())
    assert_right(logits(layer, 2))
    assert layer.__dict__[COPY] is None
    assert calls == [2]


def test_new_weights_are_copied_anew(twelve_bits: None) -> None:
    layer = built(ParallelLMHead)
    record_metadata_for_reloading(layer)
    load(layer, weights())
    logits(layer, 1)
    initialize_layerwise_reload(layer)
    layer.weight.weight_loader(layer.weight, weights(seed=5))
    finalize_layerwise_reload(layer, SimpleNamespace(dtype=torch.bfloat16))
    assert torch.equal(layer.weight.data, weights(seed=5))
    assert_right(logits(layer, 1))


@pytest.fixture
def rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "serving_options", lambda: ServingOptions(head="int8"))


@needs_rounding
@pytest.mark.parametrize(
    "isa", ["avx512_bf16", "zen5", "avx512_vbmi2", "avx512_vnni", "avx512", "avx2_vnni", "avx2"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_head_of_int8_takes_any_number_of_tokens(
    rounded: None,
    calls: list[int],
    dtype: torch.dtype,
    isa: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if isa not in instruction_sets():
        pytest.skip(f"this CPU or build does not run {isa}")
    monkeypatch.setenv("PERMLLM_CPU_ISA", isa)
    layer = built(ParallelLMHead, dtype)
    load(layer, weights(dtype=dtype))
    for tokens in (1, 8, 11, 40):
        answer, exact = logits(layer, tokens, dtype)
        assert answer.dtype == dtype
        assert 1e-4 < (answer.double() - exact).norm() / exact.norm() < 2e-2
    assert layer.__dict__[COPY].packed.nbytes < 0.55 * layer.weight.nbytes
    assert PACKED not in layer.__dict__
    assert calls == []
    assert torch.equal(layer.weight.data, weights(dtype=dtype))


def test_a_head_of_int8_has_no_kernel_everywhere(
    rounded: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    monkeypatch.setattr(head.logger, "warning", lambda text, *words: told.append(text % words))
    monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    layer = built(ParallelLMHead)
    load(layer, weights())
    assert_right(logits(layer, 2))
    assert_right(logits(layer, 2))
    assert layer.__dict__[COPY] is None
    (message,) = told
    assert message.startswith("the output head, bfloat16 of 128 inputs on cpu, stays as it is: ")
    embedding = built(VocabParallelEmbedding)
    load(embedding, weights())
    embedding(torch.tensor([1]))
    assert len(told) == 1


@needs_kernel
@pytest.mark.parametrize("option", ["dense", "int8"])
def test_heads_of_vllms_own_method_are_adopted(
    option: str, monkeypatch: pytest.MonkeyPatch, calls: list[int]
) -> None:
    """Some of vLLM's models ask no plugin for the method of the embedding that is their head."""
    asked = ServingOptions.model_validate({"head": option})
    monkeypatch.setattr(head, "serving_options", lambda: asked)
    with torch.device("cpu"):
        layer = VocabParallelEmbedding(WORDS, CHANNELS, params_dtype=torch.bfloat16)
    layer.weight.weight_loader(layer.weight, weights())
    model = torch.nn.ModuleList([layer, torch.nn.Linear(2, 2)])
    adopt_heads(model)
    method: Any = layer.quant_method
    assert isinstance(method, HeadMethod)
    adopt_heads(model)
    assert layer.quant_method is method
    method.process_weights_after_loading(layer)
    assert torch.equal(layer.weight.data, weights())
    assert torch.equal(layer(torch.tensor([3, 0])), weights()[[3, 0]])
    assert may_lie_in_huge_pages(layer.weight.data_ptr())
    answer, exact = logits(layer, 2)
    error = (answer.double() - exact).norm() / exact.norm()
    assert (error > 4e-3) == (option == "int8")
    assert error < 2e-2
    assert calls == ([] if option == "int8" else [2])
    assert PACKED not in layer.__dict__


@needs_kernel
@pytest.mark.parametrize("generates", [True, False])
def test_an_embedding_that_is_the_head_is_packed_with_its_weight(
    generates: bool, twelve_bits: None
) -> None:
    """vLLM gives the KV cache what is left then; of a model that pools, nothing multiplies it."""
    layer = VocabParallelEmbedding(
        WORDS, CHANNELS, params_dtype=torch.bfloat16, quant_config=config()
    )
    layer.weight.weight_loader(layer.weight, weights())
    adopt_heads(torch.nn.ModuleList([layer]), generates=generates)
    layer.quant_method.process_weights_after_loading(layer)
    assert (COPY in layer.__dict__) == generates


def test_a_weight_on_another_device_stays_there(rounded: None) -> None:
    """vLLM loads weights outside of the context that sets the device of what is created."""
    layer = VocabParallelEmbedding(WORDS, CHANNELS, params_dtype=torch.bfloat16).to("meta")
    adopt_heads(torch.nn.ModuleList([layer]))
    method: Any = layer.quant_method
    assert isinstance(method, HeadMethod)
    assert layer.weight.is_meta
    assert method.tokens == 0
    assert not can_round(layer.weight)


@pytest.mark.parametrize("how", ["as built", "after loading", "adopted"])
@pytest.mark.parametrize("served", ["portable", "in place", "12 bits", "int8"])
def test_new_weights_of_an_embedding_reach_a_tied_head(
    how: str, served: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """The checkpoint has none for the head, so vLLM tells the method of the embedding alone."""
    if served == "int8":
        request.getfixturevalue("rounded")
    elif served == "12 bits":
        request.getfixturevalue("twelve_bits")
    elif served == "portable":
        monkeypatch.setenv("PERMLLM_CPU_ISA", "portable")
    quantization = None if how == "adopted" else config()
    layers = [
        layer_class(WORDS, CHANNELS, params_dtype=torch.bfloat16, quant_config=quantization)
        for layer_class in (VocabParallelEmbedding, ParallelLMHead)
    ]
    embedding, tied = layers
    if how != "after loading":
        tied.tie_weights(embedding)
    model = torch.nn.ModuleList(layers)
    record_metadata_for_reloading(model)
    for layer in layers:
        layer.weight.weight_loader(layer.weight, weights())
    adopt_heads(model)
    untied = SimpleNamespace(word_embeddings_untied_by_checkpoint=how == "after loading")
    maybe_retie_word_embeddings(model, untied)
    assert tied.weight is embedding.weight
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
    before = [logits(tied, tokens)[0] for tokens in (1, MOST + 1)]
    initialize_layerwise_reload(model)
    embedding.weight.weight_loader(embedding.weight, weights(seed=5))
    finalize_layerwise_reload(model, SimpleNamespace(dtype=torch.bfloat16))
    assert torch.equal(tied.weight.data, weights(seed=5))
    for tokens, old in zip((1, MOST + 1), before, strict=True):
        answer, exact = logits(tied, tokens)
        assert (answer.double() - exact).norm() < 2e-2 * exact.norm()
        assert (old.double() - exact).norm() > exact.norm()


@needs_rounding
@pytest.mark.parametrize("head_dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_vllm_multiplies_in_another_dtype(
    head_dtype: torch.dtype,
    rounded: None,
    vllm_config: VllmConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks no method then, so a copy would only take memory, and the option be of no use."""
    told: list[str] = []
    monkeypatch.setattr(head.logger, "warning_once", lambda text, *words: told.append(text % words))
    model = SimpleNamespace(head_dtype=head_dtype, dtype=torch.bfloat16)
    monkeypatch.setattr(vllm_config, "model_config", model)
    layer = built(ParallelLMHead)
    load(layer, weights())
    if head_dtype == torch.bfloat16:
        assert layer.__dict__[COPY] is not None
        assert not told
    else:
        assert layer.__dict__[COPY] is None
        (message,) = told
        assert "in float32 (its head_dtype) where the model has bfloat16" in message
