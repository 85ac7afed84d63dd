"""Layers are handed over in order, fed by the pruned ones before them."""

from copy import deepcopy

import pytest
import torch

from permllm_offline.calibration.calibrated_model import Calibrated
from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.heads import heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.prune_plan import Plan
from permllm_offline.pruning.layerwise import reconstruct_layers, relative_error
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import LayerDecision, decide
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.tiny_models import tiny_llama

FAMILY = FAMILIES["llama"]


def windows(count: int = 3) -> torch.Tensor:
    return torch.randint(0, 64, (count, 16), generator=torch.Generator().manual_seed(0))


def prepare() -> tuple[Calibrated, list[LayerDecision]]:
    model = tiny_llama().requires_grad_(False)
    decisions: list[LayerDecision] = []
    for layer in model.model.layers:
        decisions.append([])
        for group in FAMILY.groups:
            weights = {name: layer.get_submodule(name).weight for name in group.linears}
            width = next(iter(weights.values())).shape[1]
            layout = GroupLayout(group, width, 64, heads_of(model.config))
            scores = {name: weight.abs() for name, weight in weights.items()}
            decisions[-1].append(decide(layout, scores, None, Pattern(2, 4)))
    layouts = [[group.layout for group in layer] for layer in decisions]
    plan = Plan(FAMILY, layouts, [], 0, 0)
    recipe = Recipe(model="tiny", method="wanda")
    return Calibrated(model, plan, recipe, windows(), None, lambda *_: {}), decisions


def test_layers_run_one_by_one_are_the_model() -> None:
    model = tiny_llama()
    calls = record_calls(model, FAMILY, windows())
    states = calls.states
    for layer, call in zip(model.model.layers, calls.layers, strict=True):
        states = run_windows(layer, states, call)
    expected = model(windows()).logits
    torch.testing.assert_close(model.lm_head(model.model.norm(states.hidden)), expected)


def test_inputs_come_from_pruned_layers_and_targets_from_dense_ones() -> None:
    calibrated, decisions = prepare()
    dense = deepcopy(calibrated.model)
    twin = deepcopy(dense)
    for layer, decision in zip(twin.model.layers, decisions, strict=True):
        apply_masks(layer, decision)
    expected = {
        kind: model.model(windows(), output_hidden_states=True).hidden_states
        for kind, model in (("dense", dense), ("pruned", twin))
    }
    seen: list[int] = []

    def check(work: LayerWork) -> LayerDecision:
        seen.append(work.index)
        torch.testing.assert_close(work.inputs.hidden, expected["pruned"][work.index])
        if work.index == 0:  # the last hidden state of transformers has passed the final norm
            torch.testing.assert_close(work.targets, expected["dense"][1])
        original = dense.model.layers[work.index].mlp.up_proj.weight
        assert torch.equal(work.layer.mlp.up_proj.weight, original)
        return work.decision

    _, errors = reconstruct_layers(calibrated, decisions, check)
    assert seen == [0, 1]
    for error in errors:
        assert error.before == pytest.approx(error.after, rel=1e-5)
    for name, parameter in calibrated.model.named_parameters():
        assert torch.equal(parameter, twin.get_parameter(name)), name


def test_the_steps_of_a_reconstruction_are_in_the_error_of_its_layer() -> None:
    calibrated, decisions = prepare()

    def note(work: LayerWork) -> LayerDecision:
        work.curve.append({"step": 0, "validation_loss": work.index + 0.5})
        return work.decision

    _, errors = reconstruct_layers(calibrated, decisions, note)
    assert [error.curve for error in errors] == [
        [{"step": 0, "validation_loss": 0.5}],
        [{"step": 0, "validation_loss": 1.5}],
    ]


def test_what_a_reconstruction_writes_outside_the_masks_is_dropped() -> None:
    calibrated, decisions = prepare()

    def fill(work: LayerWork) -> LayerDecision:
        work.layer.mlp.down_proj.weight.data.fill_(0.5)
        return work.decision

    reconstruct_layers(calibrated, decisions, fill)
    weight = calibrated.model.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight != 0, decisions[1][3].mask("mlp.down_proj"))


def test_relative_error() -> None:
    target = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    assert relative_error(torch.zeros(2, 2), target) == 1.0
    assert relative_error(target * 1.5, target) == pytest.approx(0.25)
