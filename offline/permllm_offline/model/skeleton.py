"""A model without weights: its modules under the names that checkpoints have for them."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
from torch import nn

from permllm_offline.model.heads import attention_options


def skeleton_of(config: Any, dtype: torch.dtype | None = None) -> nn.Module:
    """Build the causal language model of a configuration on the meta device, without weights.

    In ``dtype`` where one is given, but for what its class keeps in float32.

    Raises:
        CheckpointError: experts that cannot be pruned linear by linear.
    """
    from transformers import AutoModelForCausalLM

    from permllm_vllm.hf.experts import separate_experts
    from permllm_vllm.hf.precision import kept_in_float32

    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(
            deepcopy(config), dtype=dtype, trust_remote_code=False, **attention_options(config)
        )
    separate_experts(model)
    if dtype is not None:
        for name, tensor in model.state_dict(keep_vars=True).items():
            if kept_in_float32(model, name, dtype):
                tensor.data = tensor.data.float()
    return model
