"""What some model types do beyond their layers: to the text that comes, and to the logits."""

from __future__ import annotations

from typing import Any


def begin_token(config: Any) -> int | None:
    """Return the token that every text must begin with, or None.

    Gemma answers nonsense without its token for the beginning of a sequence, so every window gets
    it, as in lm-eval. Other models go without, so that perplexities are those of the literature.
    """
    if not str(getattr(config, "model_type", None)).startswith("gemma"):
        return None
    token: int | None = config.bos_token_id
    return token


def logit_scale(config: Any) -> float:
    """Return what a model multiplies the products of its head by.

    Granite divides its logits, Cohere multiplies them.
    """
    scale = float(getattr(config, "logit_scale", None) or 1)
    return scale / float(getattr(config, "logits_scaling", None) or 1)
