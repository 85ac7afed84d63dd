"""Values of latent attention lie head by head."""

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.quantization.latent_attention import store_values_by_head


def test_values_lie_head_by_head() -> None:
    attention = torch.nn.Module()
    stored = torch.randn(3 * 4, 8)
    by_rank = stored.T.view(8, 3, 4).transpose(0, 1)
    attention.W_UV = torch.nn.Parameter(by_rank, requires_grad=False)
    store_values_by_head(torch.nn.ModuleList([attention, torch.nn.Linear(2, 2)]))
    assert attention.W_UV.is_contiguous()
    assert torch.equal(attention.W_UV, by_rank)
