"""States of Mamba layers on CPUs, of which vLLM has none from the middle of a prompt."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn import Module


def split_prompts_at_blocks(model: Module) -> None:
    """Have no layer keep a state from within a prompt, in a model that is loaded.

    For prefix caching vLLM 0.32 asks the scan for the state at the end of a block of the cache, and
    the scan for CPUs gives the last one alone: a long prompt ended the engine. Without that, its
    scheduler ends each part of a prompt where a block does.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "get_state_shape") and hasattr(module, "get_kv_cache_spec"):
            original = module.get_kv_cache_spec
            module.get_kv_cache_spec = partial(_without_checkpoints, original)


def _without_checkpoints(original: Callable[[Any], Any], vllm_config: Any) -> Any:
    spec = original(vllm_config)
    if not getattr(spec, "num_prefill_checkpoint_blocks", 0):
        return spec
    return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
