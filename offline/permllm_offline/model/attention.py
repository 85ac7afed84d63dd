"""What a model's attention asks of whoever runs it."""

from __future__ import annotations

from typing import Any

from permllm_offline.model.heads import cached_channels, layers_that_share


def attention_options(config: Any) -> dict[str, str]:
    """What transformers must be told to compute attention as the model does.

    Its fused attention leaves out the cap of Gemma 2's scores (arXiv 2408.00118, section 2), which
    only its plain one knows.

    Args:
        config: transformers configuration of a language model.
    """
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    return {"attn_implementation": "eager"} if capped else {}


def kv_cache_bytes(config: Any, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of so many tokens in every layer; zero where a configuration says too little.

    More than there are where some layers keep fewer, or a state in their place.
    """
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", None) or not getattr(text, "num_hidden_layers", 0):
        return 0
    own = range(layers_that_share(text).start)
    widest = max(cached_channels(text, layer) for layer in own)
    return tokens * len(own) * widest * itemsize
