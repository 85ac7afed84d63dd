"""What attention keeps of each token, held against the caches that Transformers fills."""

import pytest
import torch

from permllm_offline.model.attention import kv_cache_bytes
from tests.offline.tiny_models import tiny_model


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "deepseek_v2", "deepseek_v3"])
def test_the_cache_is_as_large_as_that_of_transformers(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        cache = model(torch.arange(2, 9)[None], use_cache=True).past_key_values
    held = [tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert kv_cache_bytes(model.config, tokens=7, itemsize=4) == sum(held)
