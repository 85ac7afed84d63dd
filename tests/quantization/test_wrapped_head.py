"""A head that is an embedding which vLLM wraps for adapters, as Cohere's."""

from typing import Any

import pytest
import torch
from vllm.lora.layers.vocab_parallel_embedding import VocabParallelEmbeddingWithLoRA
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from permllm_vllm.quantization import head
from permllm_vllm.quantization.head import COPY
from permllm_vllm.quantization.options import ServingOptions
from tests.quantization.dense_heads import CHANNELS, built, load, needs_rounding, weights


@needs_rounding
@pytest.mark.usefixtures("on_rank")
def test_the_wrapper_has_no_copy_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM gives it, not what it wraps, to the method."""
    monkeypatch.setattr(head, "serving_options", lambda: ServingOptions(head="int8"))
    layer = built(VocabParallelEmbedding)
    load(layer, weights())
    wrapper: Any = VocabParallelEmbeddingWithLoRA(layer)
    x = torch.randn(3, CHANNELS).bfloat16()
    answer = layer.quant_method.apply(layer, x)
    assert torch.equal(wrapper.quant_method.apply(wrapper, x), answer)
    assert COPY in layer.__dict__
    assert COPY not in wrapper.__dict__
