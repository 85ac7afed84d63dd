"""Speculative decoding of models with recurrent states, which vLLM cannot do on CPUs.

With drafts, vLLM copies the states of linear attention by Triton kernels
(`precopy_mamba_align_fused_kernel` in `vllm/v1/worker/mamba_utils.py`), which a CPU has not: the
first request ends the engine with "'function' object is not subscriptable".

Upstream: not reported. For vLLM 0.32.
"""

from typing import Any

from torch.nn import Module

ASKED = ("get_state_shape", "get_kv_cache_spec")
"""What vLLM's runner asks the layers for whose states it keeps as a whole."""


def refuse_drafts(model: Module, vllm_config: Any) -> None:
    """Raise NotImplementedError for speculative decoding of a model that has such states."""
    recurrent = any(all(hasattr(one, name) for name in ASKED) for one in model.modules())
    if vllm_config.speculative_config is not None and recurrent:
        raise NotImplementedError(
            "--speculative-config was given, and the model has layers with recurrent states "
            "(linear attention), of which vLLM takes back no rejected tokens on a CPU. Serve "
            "without the option, or on a GPU."
        )
