"""Parts of vLLM's compilation on CPUs that answer wrongly, left out of the model being built.

Each is one that dense models have too. What users ask for by name stays as they asked.
"""

from typing import Any

import torch

from permllm_vllm.compat import get_current_vllm_config_or_none

ROTARY = "rotary_embedding"
"""vLLM's name of the operation in `custom_ops` of `--compilation-config`."""
REORDERING = "reorder_for_peak_memory"
"""Inductor's name of the pass in `inductor_compile_config` of `--compilation-config`."""


def has_latent_attention(hf_config: Any) -> bool:
    """Whether keys and values of all heads come from one vector (multi-head latent attention)."""
    return getattr(hf_config.get_text_config(), "kv_lora_rank", None) is not None


def leave_out_wrong_answers(*, latent_attention: bool) -> None:
    """Change the compilation of the model that is being built, where that is for a CPU.

    Where loops are fused for a CPU, torch 2.13 forgets that one operation reads what another writes
    in place (pytorch/pytorch#185509), as vLLM's products of dense layers do, and the pass that
    reorders operations lets routers of experts read logits before they are there. Latent attention
    hands the rotary kernel, which only `--enforce-eager` runs, queries of three dimensions, which
    that of vLLM 0.32 takes for one head.
    """
    config = get_current_vllm_config_or_none()
    if config is None or torch.empty(0).device.type != "cpu":
        return
    config.compilation_config.inductor_compile_config.setdefault(REORDERING, False)
    operations = config.compilation_config.custom_ops
    chosen = {f"+{ROTARY}", f"-{ROTARY}"} & set(operations)
    if latent_attention and "all" in operations and not chosen:
        operations.append(f"-{ROTARY}")
