"""One decoder layer is tuned towards the dense one's output, under its masks."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from permllm_offline.errors import OfflineError
from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.states import States
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.pruning.layerwise import relative_error
from permllm_offline.reconstruction.blockwise import (
    squared_error,
    tune_kept_weights,
)
from permllm_offline.reconstruction.kept_weights import KeptWeights
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.reconstruction.layer_work import LayerReconstruction, LayerWork
from permllm_offline.reconstruction.obs import choose_and_update, update_kept_weights
from permllm_offline.run.schedules import warmed_cosine
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern
from tests.offline.baked_models import decisions_of
from tests.offline.tiny_models import tiny_llama

update_and_tune = RECONSTRUCTIONS["obs+blockwise"].layer
choose_and_tune = RECONSTRUCTIONS["sparsegpt+blockwise"].layer

PATTERN = Pattern(2, 4)
CONSTANTS = {"steps": 20, "learning_rate": 3e-3, "validation_windows": 3, "validation_interval": 5}


def layer_work(dtype: torch.dtype = torch.float32, **constants: Any) -> LayerWork:
    """The second layer of a tiny model, whose inputs are not what its targets were made from."""
    model = tiny_llama().to(dtype).requires_grad_(False)
    tokens = torch.randint(0, 64, (12, 16), generator=torch.Generator().manual_seed(0))
    calls = record_calls(model, FAMILIES["llama"], tokens)
    layer, call = model.model.layers[1], calls.layers[1]
    targets = run_windows(layer, calls.states, call).hidden
    noise = torch.randn(calls.states.hidden.shape, generator=torch.Generator().manual_seed(1))
    inputs = States(calls.states.hidden + 0.1 * noise.to(dtype))
    decision = decisions_of(model, PATTERN, 64)[1]
    recipe = make_recipe({"model": "tiny", "blockwise": CONSTANTS | constants})
    return LayerWork(1, layer, call, decision, inputs, targets, recipe)


def first_windows(work: LayerWork, count: int | None = None) -> float:
    output = run_windows(work.layer, work.inputs[:count], work.call).hidden
    return relative_error(output, work.targets[:count])


def weights(work: LayerWork) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in work.layer.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reconstruct", [tune_kept_weights, update_and_tune])
def test_the_layer_comes_closer_and_pruned_weights_stay_zero(
    reconstruct: LayerReconstruction, dtype: torch.dtype
) -> None:
    before, after = layer_work(dtype), layer_work(dtype)
    if reconstruct is update_and_tune:
        update_kept_weights(before)
    apply_masks(before.layer, before.decision)
    assert reconstruct(after) == after.decision
    assert first_windows(after, 3) < first_windows(before, 3)
    assert first_windows(after) < 0.95 * first_windows(before)
    for group in after.decision:
        for name in group.masks:
            weight = after.layer.get_submodule(name).weight
            assert weight.dtype is dtype
            assert not weight[~group.mask(name)].any(), name
    norm = "input_layernorm.weight"
    assert torch.equal(weights(after)[norm], weights(before)[norm])
    assert not any(p.requires_grad or p.grad is not None for p in after.layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chosen_masks_are_tuned_and_no_others(dtype: torch.dtype) -> None:
    chosen, tuned = layer_work(dtype), layer_work(dtype)
    expected, final = choose_and_update(chosen), choose_and_tune(tuned)
    apply_masks(chosen.layer, expected)
    assert first_windows(tuned, 3) < first_windows(chosen, 3)  # held out from tuning
    assert first_windows(tuned) < 0.95 * first_windows(chosen)
    differ = False
    for group, same, given in zip(final, expected, tuned.decision, strict=True):
        assert group.retained == same.retained
        for name in group.masks:
            mask, weight = group.mask(name), tuned.layer.get_submodule(name).weight
            assert torch.equal(mask, same.mask(name)), name
            assert torch.equal(choose_mask(mask.float(), PATTERN, group.permutation, 64), mask)
            assert weight.dtype is dtype
            assert not weight[~mask].any(), name
            differ |= not torch.equal(mask, given.mask(name))
    assert differ


def test_chosen_masks_stay_where_tuning_makes_it_worse() -> None:
    chosen, tuned = layer_work(), layer_work(learning_rate=10.0)
    apply_masks(chosen.layer, choose_and_update(chosen))
    choose_and_tune(tuned)
    for name, weight in weights(chosen).items():
        assert torch.equal(weights(tuned)[name], weight), name


def test_the_curve_has_the_errors_of_the_steps() -> None:
    work, masked = layer_work(), layer_work()
    apply_masks(masked.layer, masked.decision)
    tune_kept_weights(work)
    assert [entry["step"] for entry in work.curve] == list(range(21))
    assert all("loss" in entry for entry in work.curve[1:])
    measured = {e["step"]: e["validation_loss"] for e in work.curve if "validation_loss" in e}
    assert list(measured) == [0, 5, 10, 15, 20]
    for value, layer in ((measured[0], masked), (min(measured.values()), work)):
        output = run_windows(layer.layer, layer.inputs[:3], layer.call).hidden
        expected = float((output - layer.targets[:3]).square().sum()) / 3
        assert value == pytest.approx(expected, rel=1e-4)


def test_weights_that_get_worse_are_not_kept() -> None:
    masked, tuned = layer_work(), layer_work(learning_rate=10.0)
    apply_masks(masked.layer, masked.decision)
    tune_kept_weights(tuned)
    for name, weight in weights(masked).items():
        assert torch.equal(weights(tuned)[name], weight), name


def test_held_out_windows_are_never_learned_from() -> None:
    first, other = layer_work(validation_interval=20), layer_work(validation_interval=20)
    targets = other.targets.clone()
    targets[:3] += 0.01 * targets[:3].std()  # still better after tuning than before
    tune_kept_weights(first)
    tune_kept_weights(replace(other, targets=targets))
    for name, weight in weights(first).items():
        assert torch.equal(weights(other)[name], weight), name


def test_the_seed_decides() -> None:
    same = [weights(work) for work in (layer_work(), layer_work()) if tune_kept_weights(work)]
    assert all(torch.equal(same[0][name], same[1][name]) for name in same[0])
    other = layer_work()
    tune_kept_weights(replace(other, recipe=other.recipe.model_copy(update={"seed": 1})))
    assert not torch.equal(weights(other)["mlp.up_proj.weight"], same[0]["mlp.up_proj.weight"])


def test_one_step_is_that_of_adam() -> None:
    constants = {"steps": 1, "windows_per_step": 9, "learning_rate": 1e-3, "warmup_share": 1.0}
    work, plain = layer_work(**constants), layer_work()
    tune_kept_weights(work)
    apply_masks(plain.layer, plain.decision)
    weight, mask = plain.layer.mlp.down_proj.weight, plain.decision[3].mask("mlp.down_proj")
    weight.requires_grad_(True)
    output = plain.forward(plain.inputs[3:])
    (output - plain.targets[3:]).square().sum().backward()
    # The first step of Adam goes its whole length along the sign of the gradient.
    expected = weight.detach() - 1e-3 * weight.grad.sign() * mask
    assert warmed_cosine(1, 1, 1.0) == 1
    torch.testing.assert_close(work.layer.mlp.down_proj.weight, expected, rtol=0, atol=1e-6)


def test_the_rates_of_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(KeptWeights, "step", lambda kept, rate: rates.append(rate))
    tune_kept_weights(layer_work(steps=4, warmup_share=0.5, learning_rate=0.008))
    assert rates == pytest.approx([0.004, 0.008, 0.006, 0.002])


def test_squared_error_is_in_float32() -> None:
    output = torch.full((2, 3), 300.0, dtype=torch.float16)
    assert squared_error(output, torch.zeros_like(output)).item() == 6 * 300.0**2


def test_too_few_windows_are_refused() -> None:
    with pytest.raises(OfflineError, match="12 calibration windows are too few to tune"):
        tune_kept_weights(layer_work(windows_per_step=10))


def test_an_error_that_is_not_finite_is_refused() -> None:
    work = layer_work()
    work.targets[5:] = float("inf")
    with pytest.raises(OfflineError, match="decoder layer 1 at tuning step 1 is inf"):
        tune_kept_weights(work)
