"""Prune a model of which one decoder layer at a time is in memory.

Serves every method that needs no gradient through the whole model. Each finished layer goes to the
work folder, from where it is baked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from tqdm import tqdm

from permllm_offline.activations import summed_squares
from permllm_offline.bake import apply_masks
from permllm_offline.decisions import LayerDecision, without_masks
from permllm_offline.flow import Flow
from permllm_offline.importance import IMPORTANCES
from permllm_offline.int8_values import RoundedLayer, round_layer
from permllm_offline.layerwise import (
    PASSES,
    LayerError,
    decision_of,
    finish_layer,
    load_step,
    pruned_layer,
    relative_error,
)
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.modules import linear_of
from permllm_offline.output_errors import WINDOWS
from permllm_offline.permutation.kinds import PERMUTATIONS
from permllm_offline.preparation import Prepared
from permllm_offline.pruning import decide_group
from permllm_offline.recipe import Recipe
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.report.mask_example import example_layer, unpermuted_corner
from permllm_offline.report.report import Report
from permllm_offline.run.steps import Step, WorkFolder
from permllm_offline.streaming import StreamedModel


@dataclass(frozen=True)
class PrunedLayers:
    """What was decided for a streamed model; its pruned layers lie in the work folder.

    So do their masks, which ``decisions`` lack. ``scales`` holds, per decoder layer, linear ->
    float32 [out_features] when the values are int8.
    """

    streamed: StreamedModel
    work: WorkFolder
    decisions: Sequence[LayerDecision]
    report: Report
    scales: Sequence[Mapping[str, Tensor]] | None = None
    own_text: None = None

    def layers(self) -> Iterator[tuple[nn.Module, LayerDecision]]:
        """Each decoder layer in turn with its decision, in memory until the next."""
        for index, decision in enumerate(self.decisions):
            with self.streamed.resident(index) as layer:
                step = self.work.read(_name(index))
                load_step(layer, step)
                yield layer, decision_of([group.layout for group in decision], step)


def can_stream(recipe: Recipe) -> bool:
    """Whether a recipe never needs the whole model at once."""
    method = recipe.parsed_method()
    return (
        PERMUTATIONS[method.permutation].learn is None
        and RECONSTRUCTIONS[method.reconstruction].model is None
    )


def prune_streamed(recipe: Recipe, prepared: Prepared, work: WorkFolder) -> PrunedLayers:
    """Prune the decoder layers of a model one after the other.

    Raises:
        OfflineError: weights or calibration that cannot be used.
    """
    torch.manual_seed(recipe.seed)
    plan, family, windows = prepared.plan, prepared.plan.family, prepared.windows
    streamed = StreamedModel(prepared.source, family, prepared.dtype, prepared.device)
    reconstruct = RECONSTRUCTIONS[recipe.parsed_method().reconstruction].layer
    calibration = held_out = None
    if windows is not None and reads_activations(recipe):
        calibration = Flow.into(streamed, windows.calibration)
    if windows is not None and len(windows.held_out):
        held_out = Flow.into(streamed, windows.held_out)
    decisions: list[LayerDecision] = []
    errors: list[LayerError] = []
    outputs: list[float] = []
    unpermuted: list[str] = []
    rounded: list[RoundedLayer] = []
    shown = example_layer(plan.layers)
    for index, layouts in enumerate(tqdm(plan.layers, desc="pruning", unit="layer")):
        with streamed.resident(index) as layer:
            with work.measured(PASSES):
                with summed_squares(layer, family) as squares:
                    if calibration is not None:
                        calibration.pass_dense(index, layer)
                if held_out is not None:
                    held_out.pass_dense(index, layer)
            norms = None if calibration is None else _norms(squares, calibration.tokens)
            importances = _importances(recipe, layer, norms)
            if index == shown:
                first = layouts[0]
                unpermuted = unpermuted_corner(first, importances(first), recipe.parsed_pattern())
            prune_layer = partial(
                _prune_layer, recipe, index, layouts, layer, importances, calibration
            )
            step = work.step(_name(index), prune_layer)
            load_step(layer, step)
            decision = decision_of(layouts, step)
            decisions.append(decision if index == shown else without_masks(decision))
            with work.measured(PASSES):
                if calibration is not None and reconstruct is not None:
                    calibration.pass_pruned(index, layer)
                    after = relative_error(calibration.pruned, calibration.dense)
                    errors.append(LayerError(family.layer_name(index), step.facts["before"], after))
            if recipe.values == "int8":
                rounded.append(round_layer(layer, decision, _energies(norms)))
            with work.measured(PASSES):
                if held_out is not None:
                    held_out.pass_pruned(index, layer)
                    measured = held_out.pruned[:WINDOWS], held_out.dense[:WINDOWS]
                    outputs.append(relative_error(*measured))
    before = after_all = None
    if held_out is not None and windows is not None:
        measure = partial(streamed.perplexity, windows.held_out)
        with work.measured("dense-perplexity"):
            before = measure(held_out.dense, "dense perplexity")
        with work.measured("sparse-perplexity"):
            after_all = measure(held_out.pruned, "sparse perplexity")
    report = Report.build(
        recipe,
        plan,
        decisions,
        None,
        before,
        after_all,
        errors,
        int8_errors=[layer.errors for layer in rounded],
        output_errors=outputs,
        unpermuted=unpermuted,
    )
    scales = [layer.scales for layer in rounded] or None
    return PrunedLayers(streamed, work, decisions, report, scales)


Importances = Callable[[GroupLayout], Mapping[str, Tensor]]
"""Gives linear -> float32 [out_features, in_features] for a group of the layer in memory."""


def _norms(squares: Mapping[str, Tensor], tokens: int) -> dict[str, Tensor]:
    """Group -> float32 [in_features] as in ``DenseStatistics``, from sums of squares."""
    return {group: (total / tokens).sqrt().cpu() for group, total in squares.items()}


def _energies(norms: Mapping[str, Tensor] | None) -> dict[str, Tensor] | None:
    """Group -> mean square of each input channel, as in ``Calibrated``."""
    return None if norms is None else {group: norm.square() for group, norm in norms.items()}


def _importances(
    recipe: Recipe, layer: nn.Module, norms: Mapping[str, Tensor] | None
) -> Importances:
    score = IMPORTANCES[recipe.parsed_method().importance].score

    def importances(layout: GroupLayout) -> Mapping[str, Tensor]:
        norm = None if norms is None else norms[layout.group.name]
        return {
            linear: score(linear_of(layer, linear).weight.detach(), norm)
            for linear in layout.group.linears
        }

    return importances


def _prune_layer(
    recipe: Recipe,
    index: int,
    layouts: Sequence[GroupLayout],
    layer: nn.Module,
    importances: Importances,
    calibration: Flow | None,
) -> Step:
    method, pattern = recipe.parsed_method(), recipe.parsed_pattern()
    kind = PERMUTATIONS[method.permutation]
    decision = [
        decide_group(kind, layout, importances(layout), None, pattern) for layout in layouts
    ]
    reconstruct = RECONSTRUCTIONS[method.reconstruction].layer
    if reconstruct is None or calibration is None:
        apply_masks(layer, decision)
        return pruned_layer(layer, decision)
    keywords = calibration.calls.keywords[index]
    work = LayerWork(
        index, layer, keywords, decision, calibration.pruned, calibration.dense, recipe
    )
    return finish_layer(work, reconstruct)


def reads_activations(recipe: Recipe) -> bool:
    """Whether calibration text, where there is any, runs through the decoder layers."""
    method = recipe.parsed_method()
    return (
        IMPORTANCES[method.importance].needs_activations
        or RECONSTRUCTIONS[method.reconstruction].needs_windows
        or recipe.values == "int8"
    )


def _name(index: int) -> str:
    return f"layer-{index:04d}"
