"""The order of a prune: calibrate, score, permute, mask, reconstruct, bake, report."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from permllm_offline.activations import collect
from permllm_offline.bake import apply_masks, bake_layer
from permllm_offline.calibrated import Calibrated, LearningCurve
from permllm_offline.calibration import CalibrationWindows, sample_windows
from permllm_offline.decisions import LayerDecision, decide
from permllm_offline.errors import OfflineError
from permllm_offline.evaluation import perplexity
from permllm_offline.importance import IMPORTANCES
from permllm_offline.layerwise import LayerError, reconstruct_layers
from permllm_offline.layout import GroupLayout
from permllm_offline.loading import (
    Source,
    dtype_name,
    load_model,
    load_tokenizer,
    open_source,
    parse_device,
    parse_dtype,
)
from permllm_offline.model_card import model_card
from permllm_offline.modules import decoder_layers, linear_of
from permllm_offline.permutations import PERMUTATIONS
from permllm_offline.plan import Plan, make_plan
from permllm_offline.recipe import Recipe
from permllm_offline.reconstructions import RECONSTRUCTIONS, find_reconstruction
from permllm_offline.report import Report
from permllm_vllm.checkpoint.output import check_destination, check_disk
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.writer import write_checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Everything that is checked before any work starts."""

    source: Source
    dtype: torch.dtype
    device: torch.device
    plan: Plan
    windows: CalibrationWindows | None


def prepare(recipe: Recipe, output: Path, *, force: bool = False) -> Prepared:
    """Check a recipe against the model, the data and the output, reading no weight.

    Raises:
        OfflineError, CheckpointError: the first thing that would make the prune fail.
    """
    method = recipe.parsed_method()
    reconstruction = find_reconstruction(method.reconstruction)
    device = parse_device(recipe.device)
    source = open_source(recipe.model)
    check_destination(output, source.directory, force=force)
    if getattr(source.config, "quantization_config", None) is not None:
        raise OfflineError(
            f"{recipe.model!r} is already quantized or pruned: prune its dense original."
        )
    dtype = parse_dtype(recipe.dtype) or source.dtype
    permutes = PERMUTATIONS[method.permutation].permutes
    plan = make_plan(
        source, recipe.parsed_pattern(), recipe.block_size, permuted=permutes, dtype=dtype
    )
    check_disk(output, plan.total_bytes)
    windows = None
    if recipe.dataset is not None:
        windows = sample_windows(
            recipe.dataset,
            load_tokenizer(source),
            num_samples=recipe.num_samples,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            num_held_out=recipe.evaluation_windows,
        )
    elif IMPORTANCES[method.importance].needs_activations or reconstruction.needs_windows:
        raise OfflineError(
            f"method {recipe.method!r} needs calibration text: give --dataset a file, a folder or "
            "a hub name."
        )
    return Prepared(source, dtype, device, plan, windows)


def prune(recipe: Recipe, output: Path, *, force: bool = False) -> Report:
    """Prune a model and write the checkpoint; the output folder is complete or absent.

    Raises:
        OfflineError, CheckpointError: bad input, or an output that cannot be written.
    """
    torch.manual_seed(recipe.seed)
    prepared = prepare(recipe, output, force=force)
    model = load_model(prepared.source, prepared.dtype, prepared.device)
    dense_perplexity = _held_out_perplexity(model, prepared, "dense perplexity")
    calibrated = _calibrate(recipe, prepared, model)
    decisions, curve = _decide(calibrated)
    decisions, errors, reconstruction_curve = _prune_weights(calibrated, decisions)
    report = Report.build(
        recipe,
        prepared.plan,
        decisions,
        curve,
        dense_perplexity,
        _held_out_perplexity(model, prepared, "sparse perplexity"),
        errors,
        reconstruction_curve,
    )
    write_checkpoint(
        output,
        _tensors(recipe, prepared, model, decisions),
        _quantization(recipe, prepared, decisions),
        prepared.source.directory,
        force=force,
        total_bytes=prepared.plan.total_bytes,
        config_updates={"dtype": dtype_name(prepared.dtype)},
        extra_files={
            "README.md": model_card(report, prepared.source, output.resolve().name),
            "recipe.yaml": recipe.to_yaml(),
            "report.json": report.to_json(),
        },
    )
    logger.info("wrote %s", output)
    return report


def _calibrate(recipe: Recipe, prepared: Prepared, model: Any) -> Calibrated:
    method, plan = recipe.parsed_method(), prepared.plan
    importance = IMPORTANCES[method.importance]
    hidden_states = (
        PERMUTATIONS[method.permutation].needs_hidden_states
        or RECONSTRUCTIONS[method.reconstruction].needs_hidden_states
    )
    windows = None if prepared.windows is None else prepared.windows.calibration
    statistics = None
    if windows is not None and (importance.needs_activations or hidden_states):
        statistics = collect(model, plan.family, windows, hidden_states=hidden_states)
    layers = decoder_layers(model, plan.family.layers)

    def score(layer: int, layout: GroupLayout) -> Mapping[str, Tensor]:
        norm = None if statistics is None else statistics.norms[layer][layout.group.name]
        return {
            linear: importance.score(linear_of(layers[layer], linear).weight.detach(), norm)
            for linear in layout.group.linears
        }

    return Calibrated(
        model=model,
        plan=plan,
        recipe=recipe,
        windows=windows,
        hidden_states=None if statistics is None else statistics.hidden_states,
        score=score,
    )


def _decide(calibrated: Calibrated) -> tuple[list[LayerDecision], LearningCurve]:
    recipe = calibrated.recipe
    permutations, curve = PERMUTATIONS[recipe.parsed_method().permutation].find(calibrated)
    pattern = recipe.parsed_pattern()
    decisions: list[LayerDecision] = [
        [
            decide(
                layout,
                calibrated.score(index, layout),
                found.get(layout.group.name),
                pattern,
            )
            for layout in groups
        ]
        for index, (groups, found) in enumerate(
            zip(calibrated.plan.layers, permutations, strict=True)
        )
    ]
    return decisions, curve


def _prune_weights(
    calibrated: Calibrated, decisions: list[LayerDecision]
) -> tuple[list[LayerDecision], list[LayerError], LearningCurve]:
    reconstruction = RECONSTRUCTIONS[calibrated.recipe.parsed_method().reconstruction]
    layers = decoder_layers(calibrated.model, calibrated.plan.family.layers)
    errors: list[LayerError] = []
    curve: LearningCurve = []
    if reconstruction.layer is not None:
        decisions, errors = reconstruct_layers(calibrated, decisions, reconstruction.layer)
    for layer, decision in zip(layers, decisions, strict=True):
        apply_masks(layer, decision)
    if reconstruction.model is not None:
        curve = reconstruction.model(calibrated, decisions)
        for layer, decision in zip(layers, decisions, strict=True):
            apply_masks(layer, decision)
    return decisions, errors, curve


def _held_out_perplexity(model: Any, prepared: Prepared, description: str) -> float | None:
    if prepared.windows is None or len(prepared.windows.held_out) == 0:
        return None
    return perplexity(model, prepared.windows.held_out, description)


def _tensors(
    recipe: Recipe, prepared: Prepared, model: Any, decisions: list[LayerDecision]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the checkpoint: those left dense from the source, then the baked layers."""
    family = prepared.plan.family
    reader = CheckpointReader(prepared.source.directory)
    baked = {linear.name for linear in prepared.plan.linears}
    for name in reader.names():
        if name.rpartition(".")[0] not in baked:
            tensor = reader.tensor(name)
            yield name, tensor.to(prepared.dtype) if tensor.is_floating_point() else tensor
    pattern = recipe.parsed_pattern()
    for index, (layer, decision) in enumerate(
        zip(decoder_layers(model, family.layers), decisions, strict=True)
    ):
        yield from bake_layer(family.layer_name(index), layer, decision, pattern)


def _quantization(
    recipe: Recipe, prepared: Prepared, decisions: list[LayerDecision]
) -> QuantizationConfig:
    family = prepared.plan.family
    runtime: list[str] = []
    folded: list[str] = []
    for index, decision in enumerate(decisions):
        for group in decision:
            if group.permutation is not None:
                modules = folded if group.layout.folded else runtime
                modules += [f"{family.layer_name(index)}.{linear}" for linear in group.masks]
    return QuantizationConfig.model_validate(
        {
            "pattern": recipe.pattern,
            "block_size": recipe.block_size,
            "value_dtype": dtype_name(prepared.dtype),
            "ignore": list(family.ignore),
            "runtime_permuted": runtime,
            "folded": folded,
        }
    )
