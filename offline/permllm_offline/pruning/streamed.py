"""Prune a model of which one decoder layer at a time is in memory.

Serves every method that needs no gradient through the whole model; of one that learns its
permutations a few layers at a time, these are in memory while they learn. Each finished layer goes
to the work folder, from where it is baked.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.calibration.calibrated_model import LearnedPermutations
from permllm_offline.calibration.statistics import mean_norms, summed_squares
from permllm_offline.calibration.unreached_experts import count_unreached, warn_unreached
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.prune_plan import Plan
from permllm_offline.permutation.learned_layers import reads_last_states
from permllm_offline.preparation.method_parts import parts_of, reads_activations
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.pruning.in_memory import decide_group
from permllm_offline.pruning.layerwise import (
    PASSES,
    decision_of,
    finish_layer,
    layer_error,
    layer_step_name,
    load_step,
    pruned_layer,
    relative_error,
)
from permllm_offline.pruning.output_errors import WINDOWS
from permllm_offline.pruning.streamed_learning import learn_streamed
from permllm_offline.pruning.streamed_model import StreamedModel
from permllm_offline.pruning.streamed_results import PassedLayers, go_on, keep_passed
from permllm_offline.pruning.streamed_windows import Flow
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.report.mask_example import example_layer, unpermuted_corner
from permllm_offline.report.report import Report
from permllm_offline.run.processes import count as processes
from permllm_offline.run.steps import Step, WorkFolder
from permllm_offline.sparsity.bake import apply_masks
from permllm_offline.sparsity.decisions import LayerDecision, without_masks
from permllm_offline.sparsity.group_scores import group_scores
from permllm_offline.sparsity.importance import Scores
from permllm_offline.sparsity.rounded_layer import RoundedLayer, choose_grids

_CALIBRATION, _HELD_OUT = "calibration", "held-out"


@dataclass(frozen=True)
class PrunedLayers:
    """What was decided for a streamed model; its pruned layers lie in the work folder.

    So do their masks, which ``decisions`` lack. ``rounded`` has the grids of each decoder layer
    when the values are int8 or int4.
    """

    work: WorkFolder
    decisions: Sequence[LayerDecision]
    report: Report
    rounded: Sequence[RoundedLayer] = ()
    own_text: None = None

    def layers(self) -> Iterator[tuple[Mapping[str, Tensor], LayerDecision]]:
        """Weights of each decoder layer in turn, each read when it is asked for; its decision."""
        for index, decision in enumerate(self.decisions):
            step = self.work.read(layer_step_name(index))
            yield step.tensors, decision_of([group.layout for group in decision], step)


def can_stream(recipe: Recipe) -> bool:
    """Whether a recipe never needs the whole model at once."""
    parts = parts_of(recipe)
    if parts.reconstruction.distils:
        return False
    # Several processes share the windows of a step, which is worth it for a model in memory.
    alone = not reads_last_states(recipe.learning) and processes() == 1
    return not parts.permutation.learns or alone


@products_in_float32()
def prune_streamed(recipe: Recipe, prepared: Prepared, work: WorkFolder) -> PrunedLayers:
    """Prune the decoder layers of a model one after the other.

    Raises:
        OfflineError: weights or calibration that cannot be used.
    """
    torch.manual_seed(recipe.seed)
    plan = prepared.plan
    streamed = StreamedModel(prepared.source, plan.family, prepared.dtype, prepared.device)
    learned: LearnedPermutations | None = None
    start_errors: list[float] = []
    if parts_of(recipe).permutation.learns:
        learned, start_errors = learn_streamed(recipe, prepared, work, streamed)
    if work.finished(PASSES):
        passed, decisions = PassedLayers(), _finished_decisions(plan, work, len(plan.layers))
    else:
        passed, decisions = _pass_layers(recipe, prepared, work, streamed, learned)
    passed = PassedLayers.of(work.step(PASSES, passed.step))
    warn_unreached(passed.unreached)
    report = Report.build(
        recipe,
        plan,
        decisions,
        learned,
        passed.dense_perplexity,
        passed.sparse_perplexity,
        passed.errors,
        rounding_errors=[layer.errors for layer in passed.rounded],
        output_errors=passed.outputs,
        unpermuted=passed.unpermuted,
        reallocated_errors=start_errors,
    )
    return PrunedLayers(work, decisions, report, passed.rounded)


def _pass_layers(
    recipe: Recipe,
    prepared: Prepared,
    work: WorkFolder,
    streamed: StreamedModel,
    learned: LearnedPermutations | None,
) -> tuple[PassedLayers, list[LayerDecision]]:
    """Prune the decoder layers and run the text through them, from the first that is not passed."""
    plan, windows = prepared.plan, prepared.windows
    flows: dict[str, Flow] = {}
    if windows is not None and reads_activations(recipe):
        only = parts_of(recipe).reconstruction.layer is None
        flows[_CALIBRATION] = Flow.into(streamed, windows.calibration, dense_only=only)
    if windows is not None and len(windows.held_out):
        flows[_HELD_OUT] = Flow.into(streamed, windows.held_out)
    passed, count = go_on(work, flows), len(plan.layers)
    passing = _Passing(recipe, plan, work, learned, flows, passed)
    decisions = _finished_decisions(plan, work, passed.count)
    left = range(passed.count, count)
    for index in tqdm(left, desc="pruning", unit="layer", initial=passed.count, total=count):
        with streamed.resident(index) as layer:
            decisions.append(passing.prune(index, layer))
        passed.count = index + 1
        with work.measured(PASSES):
            keep_passed(work, passed, flows)
    if windows is not None and (held_out := flows.get(_HELD_OUT)) is not None:
        measure = partial(streamed.perplexity, windows.held_out)
        with work.measured("dense-perplexity"):
            passed.dense_perplexity = measure(held_out.dense.hidden, "dense perplexity")
        with work.measured("sparse-perplexity"):
            passed.sparse_perplexity = measure(held_out.pruned.hidden, "sparse perplexity")
    return passed, decisions


@dataclass(frozen=True)
class _Passing:
    """One decoder layer after the other: what decides, the text on its way, and what it gave."""

    recipe: Recipe
    plan: Plan
    work: WorkFolder
    learned: LearnedPermutations | None
    flows: Mapping[str, Flow]
    passed: PassedLayers

    def prune(self, index: int, layer: nn.Module) -> LayerDecision:
        """Prune one decoder layer, run the text through it, and add what it gave."""
        calibration, held_out = self.flows.get(_CALIBRATION), self.flows.get(_HELD_OUT)
        norms = self._norms(index, layer)
        layouts = self.plan.layers[index]
        if index == example_layer(self.plan.layers):
            pattern = self.recipe.parsed_pattern()
            first = self._importances(layer, layouts[0], norms)
            self.passed.unpermuted = unpermuted_corner(layouts[0], first, pattern)
        step = self.work.step(
            layer_step_name(index), partial(self._pruned_layer, index, layer, norms)
        )
        load_step(layer, step)
        with self.work.measured(PASSES):
            if calibration is not None and not calibration.dense_only:
                calibration.pass_pruned(index, layer)
                after = relative_error(calibration.pruned.hidden, calibration.dense.hidden)
                name = self.plan.family.layer_name(index)
                self.passed.errors.append(layer_error(name, step, after))
        if self.recipe.values != "auto":
            decision = decision_of(layouts, step)
            values, energies = self.recipe.values, _energies(norms)
            smooths = self.recipe.smoothing
            rounded = choose_grids(layer, decision, energies, values, rounds=True, smooths=smooths)
            self.passed.rounded.append(rounded)
        with self.work.measured(PASSES):
            if held_out is not None:
                held_out.pass_pruned(index, layer)
                pair = (one.hidden[:WINDOWS] for one in (held_out.pruned, held_out.dense))
                self.passed.outputs.append(relative_error(*pair))
        return _decision(self.plan, index, step)

    def _norms(self, index: int, layer: nn.Module) -> Mapping[str, Tensor] | None:
        """Run the text through the dense layer: norms of calibration text, if there is any."""
        calibration, held_out = self.flows.get(_CALIBRATION), self.flows.get(_HELD_OUT)
        groups = self.plan.groups(index)
        with self.work.measured(PASSES):
            with summed_squares(layer, groups) as squares:
                if calibration is not None:
                    calibration.pass_dense(index, layer)
            if held_out is not None:
                held_out.pass_dense(index, layer)
        if calibration is None:
            return None
        self.passed.unreached.append(count_unreached(groups, squares))
        return mean_norms(layer, groups, squares, calibration.tokens)

    def _importances(
        self, layer: nn.Module, layout: GroupLayout, norms: Mapping[str, Tensor] | None
    ) -> Mapping[str, Scores]:
        return group_scores(parts_of(self.recipe).importance, layer, layout, norms)

    def _pruned_layer(
        self, index: int, layer: nn.Module, norms: Mapping[str, Tensor] | None
    ) -> Step:
        """Decide, prune the layer in place, and reconstruct it where the method does."""
        parts = parts_of(self.recipe)
        permutations = {} if self.learned is None else self.learned.permutations[index]
        decision = [
            decide_group(
                parts.permutation,
                layout,
                self._importances(layer, layout, norms),
                permutations.get(layout.group.name),
                self.recipe.parsed_pattern(),
            )
            for layout in self.plan.layers[index]
        ]
        calibration = self.flows.get(_CALIBRATION)
        reconstruct = parts.reconstruction.layer
        if reconstruct is None or calibration is None:
            apply_masks(layer, decision)
            return pruned_layer(layer, decision)
        work = LayerWork(
            index,
            layer,
            calibration.calls[index],
            decision,
            calibration.pruned,
            calibration.dense.hidden,
            self.recipe,
        )
        return finish_layer(work, reconstruct)


def _finished_decisions(plan: Plan, work: WorkFolder, count: int) -> list[LayerDecision]:
    """The decisions of the first decoder layers, whose steps are finished."""
    steps = (work.read(layer_step_name(index)) for index in range(count))
    return [_decision(plan, index, step) for index, step in enumerate(steps)]


def _decision(plan: Plan, index: int, step: Step) -> LayerDecision:
    """The decision of a finished layer, with masks where the report shows them."""
    decision = decision_of(plan.layers[index], step)
    return decision if index == example_layer(plan.layers) else without_masks(decision)


def _energies(norms: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Group -> mean square of each input channel, as in ``Calibrated``."""
    return None if norms is None else {group: norm.square() for group, norm in norms.items()}
