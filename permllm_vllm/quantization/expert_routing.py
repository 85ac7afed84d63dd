"""How tokens are handed to experts on CPUs, where vLLM forgets corrections and factors."""

from typing import Any

import torch
from torch.nn import Module

SCORES = ("softmax", "sigmoid")
"""vLLM's names of the scores whose correction its router for groups of experts knows."""
COMPENSATING = "DeepseekV2DecoderLayer"
"""vLLM's one decoder layer that makes up for a factor of float16, by its class."""


def choose_by_corrected_scores(model: Module) -> None:
    """Have routers without groups choose as those with one, in a model that is loaded.

    Without groups vLLM 0.32 chooses on CPUs by the scores of a softmax as if there were no
    correction bias, and has no other scores.
    """
    for _, router in _routed(model):
        corrected = router.e_score_correction_bias is not None
        known = router.scoring_func in SCORES and router.custom_routing_function is None
        if corrected and known and not router.use_grouped_topk:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def scale_routes(model: Module, dtype: torch.dtype) -> None:
    """Have routers multiply by the factor of routed experts, in a model of float16 that is loaded.

    So that sums stay in range, vLLM 0.32 divides what shared experts give by it, and leaves the
    rest to decoder layers: those of GLM-4.5, GLM-4.7-Flash and Nemotron 3 do not do it.
    """
    if dtype != torch.float16 or any(_kind(module) == COMPENSATING for module in model.modules()):
        return
    for runner, router in _routed(model):
        if router.use_grouped_topk and router.routed_scaling_factor == 1.0:
            router.routed_scaling_factor = runner.routed_scaling_factor
            runner.routed_scaling_factor = 1.0


def _routed(model: Module) -> list[tuple[Any, Any]]:
    """What runs experts, with vLLM's router for CPUs that chooses among them."""
    pairs = [(module, getattr(module, "router", None)) for module in model.modules()]
    return [(runner, router) for runner, router in pairs if _kind(router) == "CPURouter"]


def _kind(of: object) -> str:
    return type(of).__name__
