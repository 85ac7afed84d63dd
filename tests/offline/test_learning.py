from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from permllm_offline.calibrated import Calibrated
from permllm_offline.errors import OfflineError
from permllm_offline.importance import magnitude
from permllm_offline.layout import GroupLayout
from permllm_offline.learned_model import learned_model
from permllm_offline.learning import initial_logits, learn_permutations, temperature
from permllm_offline.loading import open_source
from permllm_offline.mask import choose_mask
from permllm_offline.plan import make_plan
from permllm_offline.recipe import LearningRecipe, make_recipe
from permllm_offline.recomputation import recomputed
from permllm_offline.sinkhorn import harden, sinkhorn
from permllm_vllm.checkpoint.permutation import is_bijective
from tests.offline.tiny_models import tiny_llama


def calibrated_tiny(directory: Path, **learning: object) -> Calibrated:
    recipe = make_recipe(
        {
            "model": str(directory),
            "method": "permllm-wanda",
            "block_size": 64,
            "sequence_length": 24,
            "learning": {"steps": 12, "validation_interval": 3, "windows_per_step": 2, **learning},
        }
    )
    model = tiny_llama().requires_grad_(False)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pattern = recipe.parsed_pattern()
    plan = make_plan(open_source(str(directory)), pattern, 64, permuted=True, dtype=torch.float32)

    def score(layer: int, layout: GroupLayout) -> Mapping[str, Tensor]:
        prefix = plan.family.layer_name(layer)
        return {n: magnitude(weights[f"{prefix}.{n}.weight"], None) for n in layout.group.linears}

    windows = torch.randint(0, 64, (12, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = model.model(windows, output_hidden_states=True).hidden_states
        captured: list[Tensor] = []
        handle = model.model.norm.register_forward_pre_hook(
            lambda _, inputs: captured.append(inputs[0])
        )
        model(windows)
        handle.remove()
    assert len(states) == 3
    return Calibrated(model, plan, recipe, windows, captured[0], score)


def masked_loss(calibrated: Calibrated, permutations: list[Mapping[str, Tensor]]) -> float:
    """The loss of the learned masks, by masking a fresh copy of the model."""
    model = tiny_llama()
    plan, pattern = calibrated.plan, calibrated.recipe.parsed_pattern()
    for index, layer in enumerate(model.model.layers):
        for layout in plan.layers[index]:
            permutation = permutations[index].get(layout.group.name)
            for name, score in calibrated.score(index, layout).items():
                mask = choose_mask(score, pattern, permutation, 64)
                layer.get_submodule(name).weight.data *= mask
    captured: list[Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _, inputs: captured.append(inputs[0]))
    windows, targets = calibrated.windows[:4], calibrated.hidden_states[:4]
    with torch.no_grad():
        model(windows)
    return float(1 - functional.cosine_similarity(captured[0], targets, dim=-1).mean())


def test_learning_lowers_the_held_out_loss_it_reports(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, steps=30, learning_rate=0.1)
    permutations, curve = learn_permutations(calibrated)
    measured = [entry["validation_loss"] for entry in curve if "validation_loss" in entry]
    assert min(measured) < 0.97 * measured[0]
    assert masked_loss(calibrated, permutations) == pytest.approx(min(measured), rel=1e-4)
    for layer, layouts in zip(permutations, calibrated.plan.layers, strict=True):
        for layout in layouts:
            permutation = layer[layout.group.name]
            assert permutation.shape == (layout.in_features,)
            assert is_bijective(permutation, 64)


def test_query_heads_of_a_value_head_stay_tied(tiny_model_directory: Path) -> None:
    permutations, _ = learn_permutations(calibrated_tiny(tiny_model_directory, learning_rate=0.1))
    for layer in permutations:
        first, second = layer["o"].reshape(2, 64)
        assert torch.equal(first, second)


def test_a_bad_learning_rate_never_ends_worse_than_the_start(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, learning_rate=100.0)
    permutations, curve = learn_permutations(calibrated)
    assert masked_loss(calibrated, permutations) <= curve[0]["validation_loss"] + 1e-6


def test_same_seed_same_permutations_and_the_model_is_left_as_it_was(
    tiny_model_directory: Path,
) -> None:
    runs = []
    for _ in range(2):
        calibrated = calibrated_tiny(tiny_model_directory, learning_rate=0.1)
        runs.append(learn_permutations(calibrated)[0])
        for (name, ours), theirs in zip(
            calibrated.model.state_dict().items(), tiny_llama().state_dict().values(), strict=True
        ):
            assert torch.equal(ours, theirs), name
        assert "forward" not in vars(calibrated.model.model.layers[0])
    for first, second in zip(*runs, strict=True):
        assert all(torch.equal(first[group], second[group]) for group in first)


def test_checkpointing_changes_no_gradient(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory)
    assert calibrated.windows is not None
    assert calibrated.hidden_states is not None
    gradients = []
    for checkpointed in (False, True):
        with learned_model(calibrated) as learned:
            soft = sinkhorn(initial_logits(learned.initial, 0.5), 1.0, 5)
            learned.use(harden(soft), soft)
            if checkpointed:
                with recomputed(calibrated.model.model.layers):
                    learned.loss(calibrated.windows[:2], calibrated.hidden_states[:2]).backward()
            else:
                learned.loss(calibrated.windows[:2], calibrated.hidden_states[:2]).backward()
            gradients.append(learned.gradient())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_initial_logits_harden_to_the_initial_permutation() -> None:
    order = torch.stack([torch.randperm(64) for _ in range(4)])
    soft = sinkhorn(initial_logits(order, 0.2), 1.0, 5)
    assert torch.equal(harden(soft), order)


def test_temperature_runs_linearly_from_start_to_end() -> None:
    constants = LearningRecipe(steps=10)
    assert temperature(constants, 1) == 1.0
    assert temperature(constants, 10) == pytest.approx(0.1)
    assert temperature(constants, 4) == pytest.approx(0.7)
    assert temperature(LearningRecipe(steps=1), 1) == 1.0


def test_too_few_windows_are_refused(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, validation_windows=12)
    with pytest.raises(OfflineError, match=r"12 calibration windows are too few.*--num-samples"):
        learn_permutations(calibrated)
