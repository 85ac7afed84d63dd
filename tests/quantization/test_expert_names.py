"""A model that looks its experts' parameters up by vLLM's older names finds those of every kind."""

import sys
from types import ModuleType
from typing import Any

import pytest
from torch import nn
from vllm.model_executor.model_loader.weight_utils import maybe_remap_moe_expert_param_name

from permllm_vllm.quantization.expert_names import REMAP, parameters_of_every_kind

OLD = "layers.0.moe.experts.w2_folded_permutation"
NEW = "layers.0.moe.experts.routed_experts.w2_folded_permutation"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """One that imports vLLM's function, and has a class of a model."""
    module: Any = ModuleType("model_of_experts")
    setattr(module, REMAP, maybe_remap_moe_expert_param_name)
    module.Model = type("Model", (nn.Module,), {"__module__": module.__name__})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("inside", [False, True])
def test_permutations_are_found_while_a_model_loads(module: Any, inside: bool) -> None:
    model = nn.Sequential(module.Model()) if inside else module.Model()
    remap = module.maybe_remap_moe_expert_param_name
    assert remap(OLD, {NEW: None}) == OLD
    with parameters_of_every_kind(model):
        remap = module.maybe_remap_moe_expert_param_name
        assert remap(OLD, {NEW: None}) == NEW
        assert remap(OLD, {OLD: None}) == OLD
        weight = OLD.replace("folded_permutation", "weight")
        assert remap(weight, {}) == weight
    assert module.maybe_remap_moe_expert_param_name is maybe_remap_moe_expert_param_name


def test_other_models_are_left_alone(module: Any) -> None:
    with parameters_of_every_kind(nn.Linear(2, 2)):
        assert module.maybe_remap_moe_expert_param_name is maybe_remap_moe_expert_param_name
