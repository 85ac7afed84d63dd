from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from permllm_offline.calibration.calibrated_model import Calibrated, Permutations
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import open_source
from permllm_offline.model.prune_plan import make_plan
from permllm_offline.model.recomputation import recomputed
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.permutation.hardening import harden
from permllm_offline.permutation.learned_span import (
    LearnedSpan,
    fixed_permutations,
    learned_span,
)
from permllm_offline.permutation.learning import learn_permutations
from permllm_offline.permutation.sinkhorn import sinkhorn
from permllm_offline.permutation.span_learning import initial_logits
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import LearningRecipe
from permllm_offline.sparsity.importance import magnitude
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.permutation import is_bijective
from tests.offline.recipe_lines import with_recipe
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
        return {
            n: magnitude(weights[f"{prefix}.{n}.weight"], None)[:] for n in layout.group.linears
        }

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


def masked_loss(calibrated: Calibrated, permutations: Permutations) -> float:
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
    learned = learn_permutations(calibrated)
    permutations, curve = learned.permutations, learned.curve
    measured = [entry["validation_loss"] for entry in curve if "validation_loss" in entry]
    assert min(measured) < 0.97 * measured[0]
    assert masked_loss(calibrated, permutations) == pytest.approx(min(measured), rel=1e-4)
    for layer, layouts in zip(permutations, calibrated.plan.layers, strict=True):
        for layout in layouts:
            permutation = layer[layout.group.name]
            assert permutation.shape == (layout.in_features,)
            assert is_bijective(permutation, 64)


def test_query_heads_of_a_value_head_stay_tied(tiny_model_directory: Path) -> None:
    learned = learn_permutations(calibrated_tiny(tiny_model_directory, learning_rate=0.1))
    for layer in learned.permutations:
        first, second = layer["o"].reshape(2, 64)
        assert torch.equal(first, second)


def test_a_bad_learning_rate_never_ends_worse_than_the_start(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, learning_rate=100.0)
    learned = learn_permutations(calibrated)
    permutations, curve = learned.permutations, learned.curve
    assert masked_loss(calibrated, permutations) <= curve[0]["validation_loss"] + 1e-6


def test_same_seed_same_permutations_and_the_model_is_left_as_it_was(
    tiny_model_directory: Path,
) -> None:
    runs = []
    for _ in range(2):
        calibrated = calibrated_tiny(tiny_model_directory, learning_rate=0.1)
        runs.append(learn_permutations(calibrated).permutations)
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
    windows, targets = calibrated.windows[:2], calibrated.hidden_states[:2]
    calls = record_calls(calibrated.model, calibrated.plan.family, windows)
    gradients = []
    for checkpointed in (False, True):
        with learned_span(calibrated, range(2), range(2), calls.layers) as span:
            logits = initial_logits(span.initial, LearningRecipe(), 0)
            soft = sinkhorn(logits, 1.0, 5)
            span.use(harden(soft), soft)
            with recomputed(span.layers) if checkpointed else nullcontext():
                span.loss(calls.states, targets).backward()
            gradients.append(span.gradient())
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(("given", "layers"), [("always", 2), ("never", 0), (None, 0)])
def test_checkpointing_reaches_the_learner(
    given: str | None,
    layers: int,
    tiny_model_directory: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []

    def noted(layers: Sequence[nn.Module]) -> AbstractContextManager[None]:
        seen.append(len(layers))
        return recomputed(layers)

    monkeypatch.setattr("permllm_offline.permutation.span_learning.recomputed", noted)
    learning = {"steps": 1} | ({} if given is None else {"gradient_checkpointing": given})
    options = ["--dataset", str(text_file), "--method", "permllm-wanda"]
    options += ["--num-samples", "6", "--sequence-length", "16"]
    entries = {"evaluation_windows": 0, "learning": learning}
    options += with_recipe(tmp_path / "recipe.yaml", entries)
    output = tmp_path / "sparse"
    assert main(["prune", str(tiny_model_directory), "--output", str(output), *options]) == 0
    assert seen == [layers] * bool(layers)


def test_too_few_windows_are_refused(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, validation_windows=12)
    with pytest.raises(OfflineError, match=r"12 calibration windows are too few.*--num-samples"):
        learn_permutations(calibrated)


def reallocated(calibrated: Calibrated) -> list[dict[str, Tensor]]:
    """The heuristic reallocation of every group of every layer."""
    pattern = calibrated.recipe.parsed_pattern()
    return [
        {
            layout.group.name: layout.expand(
                allocate_group(layout, calibrated.score(index, layout), pattern)
            )
            for layout in layouts
        }
        for index, layouts in enumerate(calibrated.plan.layers)
    ]


def moved(calibrated: Calibrated, permutations: Permutations) -> list[bool]:
    """Whether each layer has another permutation than the heuristic one."""
    return [
        any(not torch.equal(layer[name], start[name]) for name in layer)
        for layer, start in zip(permutations, reallocated(calibrated), strict=True)
    ]


@pytest.mark.parametrize("scope", ["model", "window"])
@pytest.mark.parametrize("layers", ["0", "last:1", "0-1"])
def test_the_layers_that_do_not_learn_are_reallocated(
    layers: str, scope: str, tiny_model_directory: Path
) -> None:
    calibrated = calibrated_tiny(
        tiny_model_directory, layers=layers, scope=scope, window=1, steps=20, learning_rate=0.3
    )
    learned = learn_permutations(calibrated)
    expected = {"0": [0], "last:1": [1], "0-1": [0, 1]}[layers]
    assert learned.layers == expected
    assert learned.sensitivities is None
    assert moved(calibrated, learned.permutations) == [index in expected for index in range(2)]
    spans = len(expected) if scope == "window" else 1
    assert [entry["step"] for entry in learned.curve] == list(range(21 * spans))
    named = [(index, index) for index in expected] if scope == "window" else [(min(expected), 1)]
    found = [(entry["first_layer"], entry["last_layer"]) for entry in learned.curve]
    assert found == [layers for layers in named for _ in range(21)]
    if scope == "model" or layers == "last:1":
        measured = [e["validation_loss"] for e in learned.curve if "validation_loss" in e]
        assert masked_loss(calibrated, learned.permutations) == pytest.approx(
            min(measured), rel=1e-4
        )


def test_a_window_is_fed_by_pruned_layers_and_compared_with_dense_ones(
    tiny_model_directory: Path,
) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, scope="window", window=1, learning_rate=0.3)
    learned = learn_permutations(calibrated)
    # The second window starts where the first has ended: at the masks that were learned there.
    start = [dict(learned.permutations[0]), reallocated(calibrated)[1]]
    second = learned.curve[13]
    assert second["validation_loss"] == pytest.approx(masked_loss(calibrated, start), rel=1e-4)


def test_auto_learns_the_layers_that_lose_most(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory, layers="auto:1", steps=1)
    learned = learn_permutations(calibrated)
    assert learned.sensitivities is not None
    pattern, losses = calibrated.recipe.parsed_pattern(), []
    for index in range(2):
        model = tiny_llama()
        for layout in calibrated.plan.layers[index]:
            permutation = reallocated(calibrated)[index][layout.group.name]
            for name, score in calibrated.score(index, layout).items():
                weight = model.model.layers[index].get_submodule(name).weight
                weight.data *= choose_mask(score, pattern, permutation, 64)
        captured: list[Tensor] = []
        model.model.norm.register_forward_pre_hook(lambda _, i, kept=captured: kept.append(i[0]))
        with torch.no_grad():
            model(calibrated.windows[:4])
        cosine = functional.cosine_similarity(captured[0], calibrated.hidden_states[:4], dim=-1)
        losses.append(float(1 - cosine.mean()))
    assert learned.sensitivities == pytest.approx(losses, rel=1e-4)
    assert learned.layers == [losses.index(max(losses))]


def test_patience_ends_learning_early(tiny_model_directory: Path) -> None:
    constants = {"steps": 60, "validation_interval": 1, "learning_rate": 1e-9, "patience": 3}
    learned = learn_permutations(calibrated_tiny(tiny_model_directory, **constants))
    assert len(learned.curve) == 1 + 3


def test_a_loss_that_is_not_finite_is_an_error(tiny_model_directory: Path) -> None:
    calibrated = calibrated_tiny(tiny_model_directory)
    calibrated = replace(calibrated, hidden_states=calibrated.hidden_states * torch.nan)
    with pytest.raises(OfflineError, match=r"loss of step 1 is nan.*--dtype"):
        learn_permutations(calibrated)


def test_a_gradient_that_is_not_finite_is_an_error(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = LearnedSpan.gradient
    monkeypatch.setattr(LearnedSpan, "gradient", lambda span: original(span) * torch.inf)
    with pytest.raises(OfflineError, match=r"gradient of learning step 1 is not finite.*--dtype"):
        learn_permutations(calibrated_tiny(tiny_model_directory))


def test_layers_that_do_not_learn_are_masked_one_at_a_time(
    tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated = calibrated_tiny(tiny_model_directory)
    calls = record_calls(calibrated.model, calibrated.plan.family, calibrated.windows)
    with learned_span(calibrated, range(2), (), calls.layers) as together:
        expected = together.run(together.initial, calls.states)
        permutations = together.permutations(together.initial)
    masked: list[range] = []
    original = LearnedSpan.__init__

    def recording(span: LearnedSpan, calibrated: Calibrated, layers: range, *rest: Any) -> None:
        masked.append(layers)
        original(span, calibrated, layers, *rest)

    monkeypatch.setattr(LearnedSpan, "__init__", recording)
    found, states = fixed_permutations(calibrated, range(2), calls.layers, calls.states)
    assert masked == [range(1), range(1, 2)]
    assert states is not None
    assert torch.equal(states.hidden, expected.hidden)
    for mine, other in zip(found, permutations, strict=True):
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    # Where nothing reads what leaves them, no window is passed.
    assert fixed_permutations(calibrated, range(2), calls.layers, None)[1] is None
