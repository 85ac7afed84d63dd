"""Latent attention goes without the kernel that rotates one head, and has values head by head."""

from types import SimpleNamespace

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, PretrainedConfig

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.quantization.latent_attention import rotate_in_pytorch, store_values_by_head


@pytest.mark.parametrize(
    ("config", "asked", "left"),
    [
        (DeepseekV3Config(), ["all"], ["all", "-rotary_embedding"]),
        (DeepseekV3Config(), ["all", "-rotary_embedding"], ["all", "-rotary_embedding"]),
        (DeepseekV3Config(), ["all", "+rotary_embedding"], ["all", "+rotary_embedding"]),
        (DeepseekV3Config(), ["none"], ["none"]),
        (LlamaConfig(), ["all"], ["all"]),
    ],
)
def test_only_a_kernel_that_nobody_asked_for_is_left_out(
    config: PretrainedConfig, asked: list[str], left: list[str]
) -> None:
    compilation = SimpleNamespace(custom_ops=list(asked))
    rotate_in_pytorch(compilation, config)
    assert compilation.custom_ops == left


def test_values_lie_head_by_head() -> None:
    attention = torch.nn.Module()
    stored = torch.randn(3 * 4, 8)
    by_rank = stored.T.view(8, 3, 4).transpose(0, 1)
    attention.W_UV = torch.nn.Parameter(by_rank, requires_grad=False)
    store_values_by_head(torch.nn.ModuleList([attention, torch.nn.Linear(2, 2)]))
    assert attention.W_UV.is_contiguous()
    assert torch.equal(attention.W_UV, by_rank)
