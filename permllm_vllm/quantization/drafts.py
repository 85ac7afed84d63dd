"""Whether vLLM builds a draft, and what reaches it (speculative decoding)."""

from permllm_vllm.compat import get_current_vllm_config_or_none


def builds_draft() -> bool:
    """Whether what vLLM builds now drafts for another model, which decides every token."""
    config = get_current_vllm_config_or_none()
    speculative = getattr(config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is None or draft is getattr(speculative, "target_model_config", None):
        return False  # where n-grams draft, vLLM calls the model itself their draft
    return bool(config.model_config is draft)


def adapters_reach_model() -> bool:
    """Whether vLLM was started with --enable-lora, and builds no draft, which it never adapts."""
    config = get_current_vllm_config_or_none()
    return getattr(config, "lora_config", None) is not None and not builds_draft()
