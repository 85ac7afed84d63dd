"""Latent attention on CPUs, where vLLM rotates one head alone, and multiplies values slowly."""

from typing import Any

from torch import Tensor
from torch.nn import Module

ROTARY = "rotary_embedding"
"""vLLM's name of the operation in `custom_ops` of `--compilation-config`."""


def rotate_in_pytorch(compilation_config: Any, hf_config: Any) -> None:
    """Leave vLLM's kernel out of a model with latent attention that is about to be built.

    It takes the queries, of three dimensions there, for those of one head (vLLM 0.32). Only
    `--enforce-eager` runs it; what users ask for by name stays.
    """
    if getattr(hf_config.get_text_config(), "kv_lora_rank", None) is None:
        return
    operations = compilation_config.custom_ops
    if "all" in operations and not {f"+{ROTARY}", f"-{ROTARY}"} & set(operations):
        operations.append(f"-{ROTARY}")


def store_values_by_head(model: Module) -> None:
    """Lay out what makes values of latent vectors head by head, in a model that is loaded.

    vLLM 0.32 leaves `W_UV` [heads, rank, channels] a view of `kv_b_proj` in which the rank comes
    last, whose product with few tokens takes PyTorch four times as long.
    """
    for module in model.modules():
        weight = getattr(module, "W_UV", None)
        if isinstance(weight, Tensor) and weight.device.type == "cpu":
            weight.data = weight.data.contiguous()
