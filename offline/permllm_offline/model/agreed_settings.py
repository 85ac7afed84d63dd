"""Settings that an engine reads and Transformers does not, or the reverse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.model.expert_settings import experts_in

AGREED: Mapping[str, Mapping[str, object]] = {
    "afmoe": {"score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    "deepseek_v2": {"norm_topk_prob": False},
    "deepseek_v3": {
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "rope_interleave": True,
    },
    "ernie4_5_moe": {"use_bias": False},
    "exaone_moe": {"swiglu_limits": None, "sliding_windows": None},
    "glm4_moe_lite": {"rope_interleave": True},
    "minimax_m2": {"scoring_func": "sigmoid", "use_routing_bias": True},
    "olmoe": {"norm_topk_prob": False, "clip_qkv": None},
    "nemotron_h": {"mlp_hidden_act": "relu2", "sliding_window": None},
}
"""By ``model_type``, the one value with which vLLM answers as Transformers, by which models are
pruned. Lists of nothing count as None."""
OF_EXPERTS: Mapping[str, Mapping[str, object]] = {
    "nemotron_h": {"mlp_bias": False, "n_shared_experts": 1},
}
"""Those that matter to models with experts alone."""


def check_agreed(config: Any) -> None:
    """Raise OfflineError for a setting of a configuration that only one of the two reads."""
    settings = dict(AGREED.get(config.model_type, {}))
    if experts_in(config):
        settings |= OF_EXPERTS.get(config.model_type, {})
    for name, agreed in settings.items():
        value = getattr(config, name, None)
        if isinstance(value, list | tuple) and not any(value):
            value = None
        if value != agreed:
            raise OfflineError(
                f"{name} is {value!r}, which vLLM and Transformers, by which models are pruned, "
                f"do not read alike: give a model with {agreed!r}."
            )
