"""Rotary embeddings on CPUs, where vLLM's kernel takes queries of separate heads for one head."""

from typing import Any

ROTARY = "rotary_embedding"
"""vLLM's name of the operation in `custom_ops` of `--compilation-config`."""
OF_SEPARATE_HEADS = frozenset({"lfm2", "lfm2_moe"})
"""Values of `model_type` whose classes hand it three dimensions, as latent attention does."""


def rotate_in_pytorch(compilation_config: Any, hf_config: Any) -> None:
    """Leave vLLM's kernel out of a model that is about to be built, where it rotates one head.

    It takes the last of three dimensions for those of all heads (vLLM 0.32). Only
    `--enforce-eager` runs it; what users ask for by name stays.
    """
    config = hf_config.get_text_config()
    latent = getattr(config, "kv_lora_rank", None) is not None
    if not latent and config.model_type not in OF_SEPARATE_HEADS:
        return
    operations = compilation_config.custom_ops
    if "all" in operations and not {f"+{ROTARY}", f"-{ROTARY}"} & set(operations):
        operations.append(f"-{ROTARY}")
