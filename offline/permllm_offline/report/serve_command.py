"""The command that serves a checkpoint with vLLM on a CPU."""

from __future__ import annotations

import shlex
from typing import Any

from permllm_offline.model.heads import kv_cache_bytes

KV_CACHE_GIB = 4
REQUEST_TOKENS = 4096
KV_CACHE_BLOCK = 128
"""Tokens; of vLLM's on a CPU."""


def serve_command(folder: str, config: Any) -> str:
    """Command to paste into a shell.

    vLLM does not start where one request of full length takes more than the KV cache, and Llama
    3.1 8B's 131072 tokens take 16 GiB: so requests are bounded, by the model's own limit, or by
    what fits, where that is smaller.

    Args:
        folder: of the checkpoint.
        config: transformers configuration of the model.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or REQUEST_TOKENS
    return (
        f"VLLM_CPU_KVCACHE_SPACE={KV_CACHE_GIB} vllm serve {shlex.quote(folder)} "
        f"--max-model-len {min(limit, REQUEST_TOKENS, _tokens_that_fit(config))}"
    )


def _tokens_that_fit(config: Any) -> int:
    """Tokens of one request that the KV cache holds, whole blocks."""
    block_bytes = kv_cache_bytes(config, KV_CACHE_BLOCK)
    if not block_bytes:
        return REQUEST_TOKENS
    return (KV_CACHE_GIB << 30) // block_bytes * KV_CACHE_BLOCK
