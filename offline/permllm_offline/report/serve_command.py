"""The command that serves a checkpoint with vLLM on a CPU."""

from __future__ import annotations

import shlex
from typing import Any

KV_CACHE_GIB = 4
REQUEST_TOKENS = 4096


def serve_command(folder: str, config: Any) -> str:
    """Command to paste into a shell.

    vLLM does not start where one request of full length takes more than the KV cache, and Llama
    3.1 8B's 131072 tokens take 16 GiB: so requests are bounded, by the model's own limit where that
    is smaller.

    Args:
        folder: of the checkpoint.
        config: transformers configuration of the model.
    """
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) or REQUEST_TOKENS
    return (
        f"VLLM_CPU_KVCACHE_SPACE={KV_CACHE_GIB} vllm serve {shlex.quote(folder)} "
        f"--max-model-len {min(limit, REQUEST_TOKENS)}"
    )
