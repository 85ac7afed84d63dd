"""Experts are chosen by scores and a correction, and weighted by the scores and a factor."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

from permllm_vllm.quantization.expert_routing import choose_by_corrected_scores, scale_routes

EXPERTS, CHOICES = 6, 2


def model_of(router: Any, factor: float = 1.0) -> torch.nn.Module:
    runner = torch.nn.Linear(2, 2)
    runner.router, runner.routed_scaling_factor = router, factor
    return torch.nn.ModuleList([runner, torch.nn.Linear(2, 2)])


@pytest.mark.parametrize("scores", ["softmax", "sigmoid"])
def test_a_correction_chooses_and_weighs_nothing(scores: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, EXPERTS, generator=generator)
    bias = torch.randn(EXPERTS, generator=generator)
    router = CPURouter(CHOICES, EXPERTS, scoring_func=scores, e_score_correction_bias=bias)
    choose_by_corrected_scores(model_of(router))
    weights, ids = router.select_experts(torch.zeros(20, 4), logits)
    for token, row in enumerate(logits):
        score = row.softmax(0) if scores == "softmax" else row.sigmoid()
        best = sorted(range(EXPERTS), key=lambda one: float(score[one] + bias[one]))[-CHOICES:]
        assert set(ids[token].tolist()) == set(best)
        expected = score[ids[token].long()] / score[best].sum()
        torch.testing.assert_close(weights[token], expected)


def test_other_routers_stay_as_they_are() -> None:
    bias = torch.zeros(EXPERTS)
    kept = {"num_expert_group": 3, "topk_group": 2}
    settings = {"scoring_func": "softmax", "e_score_correction_bias": bias}
    routers = [
        CPURouter(CHOICES, EXPERTS, **(settings | other))
        for other in (
            {"use_grouped_topk": True, **kept},
            {"e_score_correction_bias": None},
            {"scoring_func": "sqrtsoftplus"},
            {"custom_routing_function": lambda **_: None},
        )
    ]
    of_another_kind = SimpleNamespace(e_score_correction_bias=bias)  # what a model calls its router
    for router in (*routers, of_another_kind):
        before = dict(vars(router))
        choose_by_corrected_scores(model_of(router))
        assert vars(router) == before


class DeepseekV2DecoderLayer(torch.nn.Module):
    """By its name alone."""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("compensating", [False, True])
def test_a_factor_of_float16_is_the_routers(dtype: torch.dtype, compensating: bool) -> None:
    groups = {"use_grouped_topk": True, "num_expert_group": 1, "topk_group": 1}
    router = CPURouter(CHOICES, EXPERTS, scoring_func="sigmoid", **groups)
    model = model_of(router, factor=2.5)
    if compensating:
        model.append(DeepseekV2DecoderLayer())
    scale_routes(model, dtype)
    moved = dtype == torch.float16 and not compensating
    assert (router.routed_scaling_factor, model[0].routed_scaling_factor) == (
        (2.5, 1.0) if moved else (1.0, 2.5)
    )
    weights, _ = router.select_experts(torch.zeros(3, 4), torch.randn(3, EXPERTS))
    torch.testing.assert_close(weights.sum(1), torch.full((3,), router.routed_scaling_factor))
