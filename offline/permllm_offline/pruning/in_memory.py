"""Prune a model in memory: calibrate, score, permute, mask, reconstruct."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import (
    Calibrated,
    LearnedPermutations,
    LearningCurve,
)
from permllm_offline.calibration.kept_statistics import kept_number, kept_statistics
from permllm_offline.calibration.statistics import collect
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import load_model
from permllm_offline.model.lookup import family_of
from permllm_offline.model.modules import decoder_layers
from permllm_offline.permutation.kinds import PermutationKind
from permllm_offline.permutation.learned_layers import reads_last_states
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.pruning.layerwise import reconstruct_layers
from permllm_offline.pruning.output_errors import kept_outputs, output_errors, reallocated_errors
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.report.mask_example import example_layer, unpermuted_corner
from permllm_offline.report.report import Report
from permllm_offline.run.steps import Step, Work
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision, decide
from permllm_offline.sparsity.group_scores import group_scores
from permllm_offline.sparsity.importance import Scores
from permllm_offline.sparsity.int4_values import Int4Grid
from permllm_offline.sparsity.rounded_layer import RoundedLayer, Rounding, choose_grids
from permllm_offline.text.evaluation import perplexity
from permllm_offline.text.sampled_text import sample_text
from permllm_offline.text.windows import writes_itself
from permllm_vllm.checkpoint.pattern import Pattern

_OWN_TEXT = "own-text"
_FURTHER = 1 << 32
"""Seed of the windows that the model writes beside those of a data set which it writes too."""


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model as a dense one with zeros, in the original channel order, and its report."""

    model: Any
    decisions: Sequence[LayerDecision]
    report: Report
    rounded: Sequence[RoundedLayer] = ()
    """The grids of each decoder layer when the values are int8 or int4."""
    own_text: Tensor | None = None
    """Windows that the dense model wrote for its distillation: int64 [windows, sequence_length]."""

    def layers(self) -> Iterator[tuple[Mapping[str, Tensor], LayerDecision]]:
        """Weights of each decoder layer in turn, with its decision."""
        layers = decoder_layers(self.model, family_of(self.model.config).layers)
        yield from zip((layer.state_dict() for layer in layers), self.decisions, strict=True)


@products_in_float32()
def prune_model(recipe: Recipe, prepared: Prepared, work: Work | None = None) -> PrunedModel:
    """Load and prune a model; nothing is written but the finished steps that ``work`` keeps.

    Raises:
        OfflineError: weights or calibration that cannot be used.
    """
    torch.manual_seed(recipe.seed)
    model = load_model(prepared.source, prepared.dtype, prepared.device)
    work = work or Work()
    dense_perplexity = kept_number(
        work,
        "dense-perplexity",
        lambda: _held_out_perplexity(model, prepared, "dense perplexity"),
    )
    family, held_out = prepared.plan.family, _held_out(prepared)
    dense_outputs = [] if held_out is None else kept_outputs(work, model, family, held_out)

    def measured_errors() -> list[float]:
        if held_out is None:
            return []
        with work.measured("output-errors"):
            return output_errors(model, family, held_out, dense_outputs)

    own = own_text(recipe, prepared, model, work)
    calibrated = calibrate(recipe, prepared, model, own, work)
    decisions, learned = _decide(calibrated)
    unpermuted = _unpermuted(calibrated)
    start_errors: list[float] = []
    if learned is not None and held_out is not None:
        with work.measured("output-errors"):
            start_errors = reallocated_errors(calibrated, held_out, dense_outputs)
    weights = _prune_weights(calibrated, decisions, measured_errors)
    decisions, rounded = weights.decisions, weights.rounded
    with work.measured("sparse-perplexity"):
        sparse_perplexity = _held_out_perplexity(model, prepared, "sparse perplexity")
    report = Report.build(
        recipe,
        prepared.plan,
        decisions,
        learned,
        dense_perplexity,
        sparse_perplexity,
        weights.errors,
        weights.curve,
        [layer.errors for layer in rounded],
        measured_errors(),
        unpermuted,
        weights.masked_errors,
        start_errors,
    )
    return PrunedModel(model, decisions, report, rounded, own)


def needs_hidden_states(recipe: Recipe) -> bool:
    """Whether anything reads the last hidden states of the dense model."""
    parts = parts_of(recipe)
    return parts.reconstruction.distils or (
        parts.permutation.learns and reads_last_states(recipe.learning)
    )


def calibrate(
    recipe: Recipe, prepared: Prepared, model: Any, own: Tensor | None, work: Work
) -> Calibrated:
    """Measure on the dense model what the recipe needs: `Calibrated`, without what it does not.

    ``own`` is the model's own text, int64 [windows, sequence_length], or None.
    """
    importance, plan = parts_of(recipe).importance, prepared.plan
    hidden_states = needs_hidden_states(recipe)
    windows = None if prepared.windows is None else prepared.windows.calibration
    if windows is not None and own is not None:
        windows = _mixed(windows, own, recipe.seed)
    statistics = None
    needs_norms = importance.needs_activations or recipe.values != "auto"
    if windows is not None and (needs_norms or hidden_states):
        groups = [plan.groups(index) for index in range(len(plan.layers))]
        collect_once = partial(
            collect, model, plan.family, windows, hidden_states=hidden_states, groups=groups
        )
        statistics = kept_statistics(work, collect_once)
    layers = decoder_layers(model, plan.family.layers)

    def score(index: int, layout: GroupLayout) -> Mapping[str, Scores]:
        norms = None if statistics is None else statistics.norms[index]
        return group_scores(importance, layers[index], layout, norms)

    return Calibrated(
        model=model,
        plan=plan,
        recipe=recipe,
        windows=windows,
        hidden_states=None if statistics is None else statistics.hidden_states,
        score=score,
        energies=None
        if statistics is None
        else [
            {group: norm.square() for group, norm in layer.items()} for layer in statistics.norms
        ],
        work=work,
    )


def own_text(recipe: Recipe, prepared: Prepared, model: Any, work: Work) -> Tensor | None:
    """Windows that the dense model writes itself, for those of the data set: where it distils."""
    count = recipe.distillation.self_windows
    distils = parts_of(recipe).reconstruction.distils
    if prepared.windows is None or not distils or count == 0:
        return None

    # The windows of `--dataset self` are those of the seed itself.
    seed = recipe.seed + (_FURTHER if any(map(writes_itself, recipe.datasets)) else 0)

    def sample() -> Step:
        return Step({"windows": sample_text(model, count, recipe.sequence_length, seed)})

    return work.step(_OWN_TEXT, sample).tensors["windows"]


def _mixed(windows: Tensor, own: Tensor, seed: int) -> Tensor:
    mixed = torch.cat([windows, own])
    return mixed[torch.randperm(len(mixed), generator=torch.Generator().manual_seed(seed))]


def _decide(
    calibrated: Calibrated,
) -> tuple[list[LayerDecision], LearnedPermutations | None]:
    recipe = calibrated.recipe
    kind = parts_of(recipe).permutation
    learned = None if kind.learn is None else kind.learn(calibrated)
    pattern = recipe.parsed_pattern()

    def decide_one(index: int, layout: GroupLayout) -> GroupDecision:
        permutation = None
        if learned is not None:
            permutation = learned.permutations[index].get(layout.group.name)
        return decide_group(kind, layout, calibrated.score(index, layout), permutation, pattern)

    with calibrated.work.measured("masks"):
        decisions: list[LayerDecision] = [
            [decide_one(index, layout) for layout in layouts]
            for index, layouts in enumerate(calibrated.plan.layers)
        ]
    return decisions, learned


def decide_group(
    kind: PermutationKind,
    layout: GroupLayout,
    importances: Mapping[str, Scores],
    learned: Tensor | None,
    pattern: Pattern,
) -> GroupDecision:
    """Find the permutation of one group, where it was not learned, and its masks."""
    if kind.allocate is not None:
        learned = layout.expand(kind.allocate(layout, importances, pattern))
    return decide(layout, importances, learned, pattern)


@dataclass(frozen=True)
class _PrunedWeights:
    """The final masks, the grids of rounded values, and what reconstruction measured."""

    decisions: list[LayerDecision]
    errors: list[LayerError]
    curve: LearningCurve
    masked_errors: list[float]
    rounded: list[RoundedLayer]


def _prune_weights(
    calibrated: Calibrated, decisions: list[LayerDecision], measure: Callable[[], list[float]]
) -> _PrunedWeights:
    reconstruction, values = parts_of(calibrated.recipe).reconstruction, calibrated.recipe.values
    layers = decoder_layers(calibrated.model, calibrated.plan.family.layers)
    errors: list[LayerError] = []
    curve: LearningCurve = []
    masked_errors: list[float] = []
    rounded: list[RoundedLayer] = []
    if reconstruction.layer is not None:
        read = calibrated
        if reconstruction.distils and calibrated.windows is not None:
            count = calibrated.recipe.distillation.layer_windows
            read = replace(calibrated, windows=calibrated.windows[:count])
        decisions, errors = reconstruct_layers(read, decisions, reconstruction.layer)
    for layer, decision in zip(layers, decisions, strict=True):
        apply_masks(layer, decision)
    if reconstruction.model is not None:
        masked_errors = measure()
        if values == "int4":
            rounded = _grids(calibrated, decisions, values, rounds=False)
        with calibrated.work.measured("distillation"):
            curve = reconstruction.model(calibrated, decisions, _int4_grids(decisions, rounded))
        for layer, decision in zip(layers, decisions, strict=True):
            apply_masks(layer, decision)
    if values != "auto" and not rounded:
        rounded = _grids(calibrated, decisions, values, rounds=True)
    return _PrunedWeights(decisions, errors, curve, masked_errors, rounded)


def _unpermuted(calibrated: Calibrated) -> list[str]:
    """What ``mask_example`` compares with, while the weights are still dense."""
    index = example_layer(calibrated.plan.layers)
    layout = calibrated.plan.layers[index][0]
    pattern = calibrated.recipe.parsed_pattern()
    return unpermuted_corner(layout, calibrated.score(index, layout), pattern)


def _grids(
    calibrated: Calibrated, decisions: Sequence[LayerDecision], values: Rounding, *, rounds: bool
) -> list[RoundedLayer]:
    """Choose the grids of all decoder layers, and move the weights there if ``rounds``."""
    layers = decoder_layers(calibrated.model, calibrated.plan.family.layers)
    energies: Sequence[Mapping[str, Tensor] | None] = calibrated.energies or [None] * len(decisions)
    smooths = calibrated.recipe.smoothing
    progress = tqdm(layers, desc=f"{values} scales", unit="layer")
    return [
        choose_grids(layer, decision, energy, values, rounds=rounds, smooths=smooths)
        for layer, decision, energy in zip(progress, decisions, energies, strict=True)
    ]


def _int4_grids(
    decisions: Sequence[LayerDecision], rounded: Sequence[RoundedLayer]
) -> list[dict[str, Int4Grid]]:
    """Linear -> grid of each decoder layer; of none where nothing is rounded yet."""
    return [
        {
            linear: layer.int4_grid(group.layout.group.name, linear)
            for group in decision
            for linear in group.masks
        }
        for decision, layer in zip(decisions, rounded, strict=bool(rounded))
    ]


def _held_out(prepared: Prepared) -> Tensor | None:
    if prepared.windows is None or len(prepared.windows.held_out) == 0:
        return None
    return prepared.windows.held_out


def _held_out_perplexity(model: Any, prepared: Prepared, description: str) -> float | None:
    windows = _held_out(prepared)
    return None if windows is None else perplexity(model, windows, description)
