"""A decoder layer's linears are updated in their permuted order, from the pruned model's inputs."""

import pytest
import torch
from torch import Tensor

from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.states import States
from permllm_offline.pruning.layerwise import relative_error
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction import obs
from permllm_offline.reconstruction.layer_work import LayerReconstruction, LayerWork
from permllm_offline.reconstruction.obs import DAMPING, choose_and_update, update_kept_weights
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute
from tests.offline.baked_models import decisions_of
from tests.offline.reconstruction.test_obs import choosing_surgeon, surgeon
from tests.offline.tiny_models import tiny_llama

PATTERN = Pattern(2, 4)
ROWS = 5
"""The plain loops are slow."""


def layer_work() -> LayerWork:
    """The first layer of a tiny model, whose inputs are not what its targets were made from."""
    model = tiny_llama().requires_grad_(False)
    tokens = torch.randint(0, 64, (12, 32), generator=torch.Generator().manual_seed(0))
    calls = record_calls(model, FAMILIES["llama"], tokens)
    layer, call = model.model.layers[0], calls.layers[0]
    targets = run_windows(layer, calls.states, call).hidden
    noise = torch.randn(calls.states.hidden.shape, generator=torch.Generator().manual_seed(1))
    inputs = States(calls.states.hidden + 0.1 * noise)
    decision = decisions_of(model, PATTERN, 64)[0]
    return LayerWork(0, layer, call, decision, inputs, targets, Recipe(model="tiny"))


def damped_moment(work: LayerWork, order: Tensor) -> Tensor:
    inputs = work.layer.input_layernorm(work.inputs.hidden).flatten(0, 1).double()[:, order]
    moment = inputs.t() @ inputs
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment))


@pytest.mark.parametrize("reconstruct", [update_kept_weights, choose_and_update])
def test_queries_equal_the_surgeon(reconstruct: LayerReconstruction) -> None:
    work = layer_work()
    qkv = work.decision[0]
    assert qkv.permutation is not None
    order = absolute(qkv.permutation, 64)
    weight = work.layer.self_attn.q_proj.weight.detach().clone()[:ROWS, order]
    mask, moment = qkv.mask("self_attn.q_proj")[:ROWS, order], damped_moment(work, order)
    final = reconstruct(work)[0]
    if reconstruct is update_kept_weights:
        expected = surgeon(weight, mask, moment)
    else:
        expected, mask = choosing_surgeon(weight, moment, PATTERN)
    assert torch.equal(final.mask("self_attn.q_proj")[:ROWS, order], mask)
    updated = work.layer.self_attn.q_proj.weight[:ROWS, order].double()
    torch.testing.assert_close(updated, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("reconstruct", [update_kept_weights, choose_and_update])
def test_the_layer_comes_closer_and_keeps_the_pattern(reconstruct: LayerReconstruction) -> None:
    masked, updated = layer_work(), layer_work()
    apply_masks(masked.layer, masked.decision)
    final = reconstruct(updated)
    apply_masks(updated.layer, final)
    errors = [
        relative_error(run_windows(work.layer, work.inputs, work.call).hidden, work.targets)
        for work in (masked, updated)
    ]
    assert errors[1] < errors[0]
    for group in final:
        for linear in group.masks:
            mask = group.mask(linear)
            assert torch.equal(choose_mask(mask.float(), PATTERN, group.permutation, 64), mask)
            assert 0.5 < group.retained[linear] < 1


@pytest.mark.parametrize("reconstruct", [update_kept_weights, choose_and_update])
def test_rows_do_not_depend_on_others(
    reconstruct: LayerReconstruction, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = layer_work(), layer_work()
    expected = reconstruct(whole)
    monkeypatch.setattr(obs, "ROWS_AT_ONCE", 24)  # of 64, 128 and 192
    found = reconstruct(parts)
    for before, after in zip(expected, found, strict=True):
        for linear, mask in before.masks.items():
            assert torch.equal(mask, after.masks[linear]), linear
            assert after.retained[linear] == pytest.approx(before.retained[linear], rel=1e-6)
            weights = (w.layer.get_submodule(linear).weight for w in (whole, parts))
            torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)
