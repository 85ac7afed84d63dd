"""Attention geometry of the decoder layers, and what attention asks of whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Heads:
    """Attention geometry: numbers of query and key/value heads, and channels per head."""

    query: int
    key_value: int
    size: int

    @property
    def queries_per_value(self) -> int:
        """Query heads that read the same value head."""
        return self.query // self.key_value


def heads_of(config: Any) -> Heads:
    """Return the attention geometry of the decoder layers, from a transformers configuration."""
    query = int(config.num_attention_heads)
    key_value = int(getattr(config, "num_key_value_heads", None) or query)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // query)
    return Heads(query, key_value, size)


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
    heads = heads_of(text)
    return int(tokens * text.num_hidden_layers * 2 * heads.key_value * heads.size * itemsize)
