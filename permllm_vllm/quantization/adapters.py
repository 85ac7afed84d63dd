"""Whether LoRA adapters reach the model that vLLM builds."""

from permllm_vllm.compat import get_current_vllm_config_or_none


def adapters_reach_model() -> bool:
    """Whether vLLM was started with --enable-lora, and builds no draft, which it never adapts."""
    config = get_current_vllm_config_or_none()
    if getattr(config, "lora_config", None) is None:
        return False
    speculative = getattr(config, "speculative_config", None)
    draft = getattr(speculative, "draft_model_config", None)
    if draft is getattr(speculative, "target_model_config", None):
        return True  # n-grams of the prompt draft: vLLM calls the model itself their draft
    return config.model_config is not draft
