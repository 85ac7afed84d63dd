"""Where vLLM's kernel would rotate one head alone, PyTorch rotates."""

from types import SimpleNamespace

import pytest
from transformers import (
    DeepseekV3Config,
    Lfm2Config,
    Lfm2MoeConfig,
    Lfm2VlConfig,
    LlamaConfig,
    PretrainedConfig,
)

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.quantization.rotary import rotate_in_pytorch


@pytest.mark.parametrize(
    ("config", "asked", "left"),
    [
        (DeepseekV3Config(), ["all"], ["all", "-rotary_embedding"]),
        (DeepseekV3Config(), ["all", "-rotary_embedding"], ["all", "-rotary_embedding"]),
        (DeepseekV3Config(), ["all", "+rotary_embedding"], ["all", "+rotary_embedding"]),
        (DeepseekV3Config(), ["none"], ["none"]),
        (Lfm2Config(), ["all"], ["all", "-rotary_embedding"]),
        (Lfm2MoeConfig(), ["all"], ["all", "-rotary_embedding"]),
        (Lfm2VlConfig(), ["all"], ["all", "-rotary_embedding"]),  # of its language model
        (LlamaConfig(), ["all"], ["all"]),
    ],
)
def test_only_a_kernel_that_nobody_asked_for_is_left_out(
    config: PretrainedConfig, asked: list[str], left: list[str]
) -> None:
    compilation = SimpleNamespace(custom_ops=list(asked))
    rotate_in_pytorch(compilation, config)
    assert compilation.custom_ops == left
