from collections.abc import Mapping
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Linear, Module
from torch.nn.functional import kl_div

from permllm_offline.calibration.calibrated_model import Calibrated
from permllm_offline.calibration.statistics import collect
from permllm_offline.errors import OfflineError
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import open_source
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.prune_plan import make_plan
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.reconstruction.distillation import Pupil, distil
from permllm_offline.reconstruction.head_inputs import head_input, head_inputs_of
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import LayerDecision, decide
from permllm_offline.sparsity.importance import magnitude
from tests.offline.tiny_models import tiny_llama, tiny_model

WINDOWS = torch.randint(0, 64, (36, 24), generator=torch.Generator().manual_seed(0))


def pruned(directory: Path, **distillation: object) -> tuple[Calibrated, list[LayerDecision]]:
    """A model without reconstruction, and what its dense twin gives at the end."""
    constants = {
        "steps": 24,
        "windows_per_step": 2,
        "learning_rate": 0.005,
        "validation_interval": 12,
    } | distillation
    recipe = make_recipe(
        {
            "model": str(directory),
            "method": "magnitude",
            "sequence_length": 24,
            "distillation": constants,
        }
    )
    model, pattern = tiny_llama().requires_grad_(False), recipe.parsed_pattern()
    plan = make_plan(open_source(str(directory)), pattern, 64, permuted=False, dtype=torch.float32)

    def score(layer: int, layout: GroupLayout) -> Mapping[str, Tensor]:
        module = model.model.layers[layer]
        return {n: magnitude(module.get_submodule(n).weight, None)[:] for n in layout.group.linears}

    states = collect(model, plan.family, WINDOWS, hidden_states=True).hidden_states
    decisions = [
        [decide(layout, score(index, layout), None, pattern) for layout in layouts]
        for index, layouts in enumerate(plan.layers)
    ]
    for layer, decision in zip(model.model.layers, decisions, strict=True):
        apply_masks(layer, decision)
    return Calibrated(model, plan, recipe, WINDOWS, states, score), decisions


def mean_divergence(model: torch.nn.Module, windows: Tensor) -> float:
    """From the dense model to ``model``, by the logits of both."""
    with torch.no_grad():
        mine = model(windows).logits.log_softmax(-1)
        wanted = tiny_llama()(windows).logits.log_softmax(-1)
    return float((wanted.exp() * (wanted - mine)).sum(-1).mean())


def test_the_divergence_falls_and_is_the_one_reported(tiny_model_directory: Path) -> None:
    calibrated, decisions = pruned(tiny_model_directory)
    held_out = calibrated.windows[:4]
    before = mean_divergence(calibrated.model, held_out)
    unseen = torch.randint(0, 64, (8, 24), generator=torch.Generator().manual_seed(1))
    unseen_before = mean_divergence(calibrated.model, unseen)
    curve = distil(calibrated, decisions)
    measured = [entry["validation_loss"] for entry in curve if "validation_loss" in entry]
    assert measured[0] == pytest.approx(before, rel=1e-4)
    assert min(measured) == pytest.approx(mean_divergence(calibrated.model, held_out), rel=1e-4)
    assert mean_divergence(calibrated.model, unseen) < 0.95 * unseen_before


def test_only_kept_weights_move(tiny_model_directory: Path) -> None:
    calibrated, decisions = pruned(tiny_model_directory)
    before = {name: tensor.clone() for name, tensor in calibrated.model.state_dict().items()}
    distil(calibrated, decisions)
    linears = set()
    for index, decision in enumerate(decisions):
        for group in decision:
            for name in group.masks:
                key = f"model.layers.{index}.{name}.weight"
                linears.add(key)
                weight = calibrated.model.state_dict()[key]
                assert not weight[~group.mask(name)].any()
                assert not torch.equal(weight, before[key])
    for key, tensor in calibrated.model.state_dict().items():
        assert key in linears or torch.equal(tensor, before[key]), key
    assert not any(p.requires_grad for p in calibrated.model.parameters())


def test_same_seed_same_weights_and_bad_steps_never_end_worse(tiny_model_directory: Path) -> None:
    results = []
    for rate in (0.003, 0.003, 30.0):
        calibrated, decisions = pruned(tiny_model_directory, steps=6, learning_rate=rate)
        before = mean_divergence(calibrated.model, calibrated.windows[:4])
        distil(calibrated, decisions)
        assert mean_divergence(calibrated.model, calibrated.windows[:4]) <= before + 1e-6
        results.append(calibrated.model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_held_out_windows_are_never_learned_from(tiny_model_directory: Path) -> None:
    results = []
    for nudge in (0.0, 0.01):
        calibrated, decisions = pruned(tiny_model_directory, validation_interval=24)
        states = calibrated.hidden_states.clone()
        states[:4] += nudge * states[:4].std()  # still better after tuning than before
        curve = distil(replace(calibrated, hidden_states=states), decisions)
        assert curve[-1]["validation_loss"] < curve[0]["validation_loss"]
        results.append(calibrated.model.state_dict())
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name


def test_the_rates_of_the_steps(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    monkeypatch.setattr(KeptWeights, "step", lambda kept, rate: rates.append(rate))
    distil(*pruned(tiny_model_directory, steps=4, warmup_share=0.5, learning_rate=0.008))
    assert rates == pytest.approx([0.004, 0.008, 0.006, 0.002])


def test_a_loss_that_is_not_finite_is_an_error(tiny_model_directory: Path) -> None:
    calibrated, decisions = pruned(tiny_model_directory)
    calibrated = replace(calibrated, hidden_states=calibrated.hidden_states * torch.nan)
    with pytest.raises(OfflineError, match=r"loss of step 1 is nan.*Lower the learning rate"):
        distil(calibrated, decisions)
    assert not any(p.requires_grad for p in calibrated.model.parameters())


def test_too_few_windows_are_refused(tiny_model_directory: Path) -> None:
    calibrated, decisions = pruned(tiny_model_directory, validation_windows=36)
    with pytest.raises(OfflineError, match=r"36 calibration windows are too few.*--num-samples"):
        distil(calibrated, decisions)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_reads_what_follows_the_last_layer(family: str) -> None:
    """OPT's head is narrower here than its layers."""
    dense = tiny_model(family).requires_grad_(False)
    last = decoder_layers(dense, FAMILIES[family].layers)[-1]
    states: list[Tensor] = []
    with last.register_forward_hook(lambda _, inputs, output: states.append(output)):
        dense(WINDOWS[:2])
    found = head_inputs_of(dense, FAMILIES[family], states[0])
    torch.testing.assert_close(found[0], head_input(dense, WINDOWS[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_the_logits_of_the_model(family: str) -> None:
    """Whatever the model does to them: Granite and Cohere scale them, Gemma 2 caps them."""
    dense = tiny_model(family).requires_grad_(False)
    other = deepcopy(dense)
    decoder_layers(other, FAMILIES[family].layers)[0].apply(_reverse_inputs)
    window = WINDOWS[0]
    theirs, mine = (model(window[None]).logits[0].log_softmax(-1) for model in (dense, other))
    expected = kl_div(mine, theirs, reduction="sum", log_target=True)
    assert expected > 1
    loss = Pupil(other).loss(window, head_input(dense, window))
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-3)


def _reverse_inputs(module: Module) -> None:
    if isinstance(module, Linear):
        module.weight.data = module.weight.data.flip(1)
