"""Recurrent states on CPUs: what vLLM cannot do with them there."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch.nn import Module


def refuse_drafts(model: Module, vllm_config: Any) -> None:
    """Raise NotImplementedError for speculative decoding of a model that has such states.

    On CPUs vLLM 0.32 calls kernels for it that are for GPUs alone, or, without prefix caching,
    keeps states that rejected tokens have changed.
    """
    if vllm_config.speculative_config is not None and _recurrent(model):
        raise NotImplementedError(
            "--speculative-config was given, and the model has layers with recurrent states "
            "(Mamba, short convolutions, linear attention), of which vLLM takes back no rejected "
            "tokens on a CPU. Serve without the option, or on a GPU."
        )


def split_prompts_at_blocks(model: Module) -> None:
    """Have no layer keep a state from within a prompt, in a model that is loaded.

    For prefix caching vLLM 0.32 asks the scan for the state at the end of a block of the cache, and
    the scan for CPUs gives the last one alone: a long prompt ended the engine. Without that, its
    scheduler ends each part of a prompt where a block does.
    """
    for module in _recurrent(model):
        original = module.get_kv_cache_spec
        module.get_kv_cache_spec = partial(_without_checkpoints, original)


def _recurrent(model: Module) -> list[Any]:
    """Layers whose states vLLM keeps as a whole, by what its runner asks them for."""
    asked = ("get_state_shape", "get_kv_cache_spec")
    return [one for one in model.modules() if all(hasattr(one, name) for name in asked)]


def _without_checkpoints(original: Callable[[Any], Any], vllm_config: Any) -> Any:
    spec = original(vllm_config)
    if not getattr(spec, "num_prefill_checkpoint_blocks", 0):
        return spec
    return replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
