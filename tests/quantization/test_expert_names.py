"""A model that looks its experts' parameters up by vLLM's older names finds those of every kind."""

import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.model_loader.weight_utils import maybe_remap_moe_expert_param_name

from permllm_vllm.quantization.expert_names import REMAP, find_every_kind

OLD = "layers.0.moe.experts.w2_folded_permutation"
NEW = "layers.0.moe.experts.routed_experts.w2_folded_permutation"
PARAMETERS: dict[str, Any] = {NEW: None, "layers.0.moe.experts.routed_experts.w2_weight": None}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that imports vLLM's function, and has a class of a model."""
    module: Any = ModuleType("model_of_experts")
    setattr(module, REMAP, maybe_remap_moe_expert_param_name)
    module.Model = type("Model", (nn.Module,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("inside", [False, True])
def test_permutations_are_found(module: Any, inside: bool) -> None:
    """Once, however often a model loads; and whatever vLLM finds by itself."""
    model = nn.Sequential(module.Model()) if inside else module.Model()
    assert module.maybe_remap_moe_expert_param_name(OLD, PARAMETERS) == OLD
    find_every_kind(model)
    remap = module.maybe_remap_moe_expert_param_name
    find_every_kind(model)
    assert module.maybe_remap_moe_expert_param_name is remap
    assert remap(OLD, PARAMETERS) == NEW
    assert remap(OLD, {OLD: None}) == OLD
    for parameters in (PARAMETERS, {}):
        name = OLD.replace("folded_permutation", "weight")
        assert remap(name, parameters) == maybe_remap_moe_expert_param_name(name, parameters)
    assert remap("layers.0.norm.weight", PARAMETERS) == "layers.0.norm.weight"


def test_other_models_are_left_alone(module: Any) -> None:
    find_every_kind(nn.Linear(2, 2))
    assert module.maybe_remap_moe_expert_param_name is maybe_remap_moe_expert_param_name
