"""Prune a model and write its checkpoint: prepare, prune, bake."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.forecast.announcement import announce
from permllm_offline.forecast.memory import shard_bytes
from permllm_offline.forecast.room import check_memory, check_room
from permllm_offline.model.loading import dtype_name
from permllm_offline.model.tokenizer import load_tokenizer, tokenizer_files
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.prepared import (
    Prepared,
    calibration_windows,
    open_prunable,
    prepare_model,
    windows_to_come,
    with_text,
    without_contents,
)
from permllm_offline.preparation.weight_check import check_weights
from permllm_offline.pruning.dense_tensors import left_dense
from permllm_offline.pruning.in_memory import PrunedModel, prune_model
from permllm_offline.pruning.resume import begin, foretell, kept_bytes, work_folder
from permllm_offline.pruning.streamed import PrunedLayers, can_stream, prune_streamed
from permllm_offline.recipe.schema import (
    BlockwiseRecipe,
    DistillationRecipe,
    LearningRecipe,
    Recipe,
)
from permllm_offline.report import papers
from permllm_offline.report.model_card import model_card
from permllm_offline.report.page import report_page
from permllm_offline.report.report import CalibrationRecord, Report
from permllm_offline.run.costs import costs_json
from permllm_offline.run.local_path import local_path
from permllm_offline.run.processes import SharedWork, count, first, joined
from permllm_offline.run.steps import WorkFolder
from permllm_offline.sparsity.bake import bake_layer, divided_norms
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_offline.text.windows import require_windows, writes_itself
from permllm_vllm.checkpoint.companions import check_companions
from permllm_vllm.checkpoint.contained import contained
from permllm_vllm.checkpoint.output import check_destination, check_outside
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.shards import read_weight_map
from permllm_vllm.checkpoint.writer import write_checkpoint

logger = logging.getLogger(__name__)


def check_writable(recipe: Recipe) -> None:
    """Raise OfflineError for a method whose permutations no checkpoint can hold."""
    if parts_of(recipe).permutation.across_blocks:
        raise OfflineError(
            f"method {recipe.method!r} moves channels through a whole layer, but a checkpoint "
            "holds permutations inside blocks only, since no kernel applies others for free. It "
            "is there to compare accuracy (`permllm_offline.pruning`); for a checkpoint, give "
            f"{recipe.method.replace('cp-global', 'cp-lsa')!r}."
        )


def check_recipe_file(file: Path, output: Path) -> None:
    """Raise CheckpointError where the output would take away the file of its own recipe.

    The ``recipe.yaml`` of a checkpoint that is replaced is read before, and written anew.
    """
    if file.resolve() != output.resolve() / papers.RECIPE:
        check_outside(output, "recipe", file)


def _check_datasets_outside(recipe: Recipe, output: Path) -> None:
    """Raise CheckpointError where the output would take away the text of its own calibration."""
    for path in map(local_path, recipe.datasets):
        if path.exists():
            check_outside(output, "data set", path)


def rehearse(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    restart: bool = False,
) -> tuple[Recipe, Prepared]:
    """Check a recipe against the model, the machine, the output and the data; nothing is written.

    No weight is read: text that the model would write itself has windows without contents. A
    warning says from what finished steps the prune would go on.

    Returns:
        The recipe with what its processes decide, and what was checked.

    Raises:
        OfflineError, CheckpointError: the first thing that would make the prune fail.
    """
    recipe, checked = check_checkpoint(recipe, output, force=force, restart=restart)
    own = partial(without_contents, recipe, "cpu")
    prepared = with_text(recipe, checked, own)
    if first() and not restart:
        text = "" if any(map(writes_itself, recipe.datasets)) else _text_digest(prepared)
        foretell(recipe, checked, output, text)
    return recipe, prepared


def check_checkpoint(
    recipe: Recipe, output: Path, *, force: bool = False, restart: bool = False
) -> tuple[Recipe, Prepared]:
    """Check everything that needs neither weights nor calibration text, which take long.

    Returns:
        The recipe with what its processes decide, and what was checked.

    Raises:
        OfflineError, CheckpointError: the first thing that would make the prune fail.
    """
    check_writable(recipe)
    asked, recipe = recipe, shared_out(recipe)
    check_processes(recipe)
    source = open_prunable(recipe).directory
    check_destination(output, source, force=force)
    _check_datasets_outside(recipe, output)
    _check_files(source)
    prepared = prepare_model(recipe)
    check_weights(prepared)
    check_memory(recipe, replace(prepared, windows=windows_to_come(recipe)))
    check_windows(recipe)
    if first() and recipe != asked:
        logger.warning(
            "a step of distillation takes %d windows, one in each process: give the recipe "
            "distillation.windows_per_step for another number",
            recipe.distillation.windows_per_step,
        )
    kept = kept_bytes(recipe, prepared, output, restart=restart)
    check_room(recipe, prepared, output, kept)
    return recipe, prepared


def shared_out(recipe: Recipe) -> Recipe:
    """The recipe with one window of distillation for each process, where it does not say.

    What one process does is as it was.
    """
    distils = parts_of(recipe).reconstruction.distils
    given = "windows_per_step" in recipe.distillation.model_fields_set
    if count() == 1 or given or not distils:
        return recipe
    constants = recipe.distillation.model_copy(update={"windows_per_step": count()})
    return recipe.model_copy(update={"distillation": constants})


def check_processes(recipe: Recipe) -> None:
    """Raise OfflineError where the processes of ``torchrun`` cannot share the steps evenly."""
    if count() == 1:
        return
    if can_stream(recipe):
        raise OfflineError(
            f"{count()} processes, but {recipe.method!r} without learning or distillation goes "
            "through the model layer by layer in one: start it without torchrun."
        )
    parts = parts_of(recipe)
    loops = {
        "learning": parts.permutation.learns and recipe.learning,
        "distillation": parts.reconstruction.distils and recipe.distillation,
    }
    for name, constants in loops.items():
        if constants and constants.windows_per_step % count():
            raise OfflineError(
                f"{count()} processes cannot share {constants.windows_per_step} windows of a step "
                f"of {name} evenly: give the recipe a {name}.windows_per_step that is a multiple "
                f"of {count()}."
            )


def check_windows(recipe: Recipe) -> None:
    """Raise OfflineError where steps of a loop have too few calibration windows.

    What several processes take in a step of distillation is that of ``shared_out``.
    """
    if not recipe.datasets:
        return
    parts, windows = parts_of(recipe), calibration_windows(recipe)
    loops: list[tuple[bool, LearningRecipe | BlockwiseRecipe | DistillationRecipe, str, str]] = [
        (parts.permutation.learns, recipe.learning, "learn from", "step"),
        (parts.reconstruction.tunes, recipe.blockwise, "tune a layer on", "weights"),
        (parts.reconstruction.distils, recipe.distillation, "distil from", "weights"),
    ]
    for takes_place, constants, purpose, chosen in loops:
        if takes_place:
            held_out = constants.validation_windows
            require_windows(windows, constants.windows_per_step, held_out, purpose, chosen)


def _check_files(directory: Path) -> None:
    """Raise CheckpointError for a file that would not be read or copied in the end.

    That is a link out, or a companion of the weights that cannot be opened.
    """
    for name in sorted(set(read_weight_map(directory).values())):
        contained(directory, name)
    check_companions(directory)


def prune(
    recipe: Recipe,
    output: Path,
    *,
    force: bool = False,
    restart: bool = False,
) -> Report:
    """Prune a model and write the checkpoint; the output folder is complete or absent.

    Finished steps lie in a work folder beside the output until it is complete: a run that was cut
    off goes on from them. ``restart`` removes them. Of the processes
    that ``torchrun`` starts, the first one writes.

    Raises:
        OfflineError, CheckpointError: bad input, or an output that cannot be written.
    """
    with joined(recipe.device):
        return _prune(recipe, output, force=force, restart=restart)


def _prune(recipe: Recipe, output: Path, *, force: bool, restart: bool) -> Report:
    recipe, checked = check_checkpoint(recipe, output, force=force, restart=restart)
    if not first():
        shared = SharedWork(None)
        return prune_model(recipe, with_text(recipe, checked), shared).report
    _warn_without_tokenizer(checked)
    with work_folder(recipe, checked, output, restart=restart) as work:
        goes_on = bool(work.kept()) and not restart
        announce(recipe, replace(checked, windows=windows_to_come(recipe)), goes_on=goes_on)
        prepared = with_text(recipe, checked)
        begin(work, _text_digest(prepared), len(prepared.plan.layers))
        report = _write(recipe, prepared, output, work, force=force)
        try:
            work.remove()
        except OfflineError as error:
            logger.warning("%s", error)  # the checkpoint is complete
    logger.info("wrote %s", output)
    return report


def _text_digest(prepared: Prepared) -> str:
    """What the calibration text adds to the identity of a run."""
    windows = prepared.windows
    return "" if windows is None else CalibrationRecord.of(windows).tokens_sha256


def _warn_without_tokenizer(prepared: Prepared) -> None:
    """Say of a model that is pruned without text what its checkpoint will lack."""
    if prepared.tokenizer is not None:
        return
    try:
        load_tokenizer(prepared.source)
    except OfflineError as error:
        logger.warning("%s vLLM and eval need the tokenizer of the checkpoint.", error)


def _write(
    recipe: Recipe, prepared: Prepared, output: Path, work: WorkFolder, *, force: bool
) -> Report:
    """Prune what was prepared, and write the checkpoint."""
    windows = prepared.windows
    pruned: PrunedModel | PrunedLayers
    if can_stream(recipe):
        pruned = prune_streamed(recipe, prepared, work)
    else:
        pruned = prune_model(recipe, prepared, work if count() == 1 else SharedWork(work))
    calibration = None if windows is None else CalibrationRecord.of(windows, pruned.own_text)
    report = replace(
        pruned.report,
        calibration=calibration,
        model_commit=prepared.source.commit,
    )
    name = output.resolve().name
    write_checkpoint(
        output,
        _tensors(recipe, prepared, pruned),
        _quantization(recipe, prepared, pruned),
        prepared.source.directory,
        force=force,
        max_shard_bytes=shard_bytes(prepared.plan),
        total_bytes=prepared.output_bytes,
        config_updates=_config_updates(prepared),
        extra_files={
            **tokenizer_files(prepared.source.directory),
            papers.CARD: model_card(report, prepared.source, name),
            papers.RECIPE: recipe.to_yaml(),
            papers.REPORT: report.to_json(),
            papers.COSTS: costs_json(work.costs),
            papers.PAGE: report_page(report, work.costs, prepared.source, name),
            papers.CONVERSION: None,
        },
    )
    return report


def _config_updates(prepared: Prepared) -> Mapping[str, Any]:
    """What ``config.json`` says of dtypes, of the language model inside another one too."""
    dtype = {"dtype": dtype_name(prepared.dtype)}
    inner = prepared.source.reader().config.get("text_config")
    return dtype if inner is None else {**dtype, "text_config": {**inner, **dtype}}


def _tensors(
    recipe: Recipe, prepared: Prepared, pruned: PrunedModel | PrunedLayers
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the checkpoint: those left dense from the source, then the baked layers."""
    family = prepared.plan.family
    norms = {
        family.stored_name(index, norm): exponents
        for index, own in enumerate(pruned.rounded)
        for norm, exponents in divided_norms(pruned.decisions[index], own).items()
    }
    yield from left_dense(prepared, norms)
    pattern = recipe.parsed_pattern()
    grids: Sequence[RoundedLayer | None] = pruned.rounded or [None] * len(pruned.decisions)
    for index, ((weights, decision), own) in enumerate(zip(pruned.layers(), grids, strict=True)):
        stored_name = partial(family.stored_name, index)
        yield from bake_layer(stored_name, weights, decision, pattern, own)


def _quantization(
    recipe: Recipe, prepared: Prepared, pruned: PrunedModel | PrunedLayers
) -> QuantizationConfig:
    family = prepared.plan.family
    runtime: list[str] = []
    folded: list[str] = []
    for index, decision in enumerate(pruned.decisions):
        for group in decision:
            if group.permutation is not None:
                modules = folded if group.layout.folded else runtime
                linears = group.layout.group.linears
                modules += [family.stored_name(index, linear) for linear in linears]
    return QuantizationConfig.model_validate(
        {
            "pattern": recipe.pattern,
            "block_size": recipe.block_size,
            "value_dtype": dtype_name(prepared.dtype) if recipe.values == "auto" else recipe.values,
            "ignore": list(prepared.plan.ignore),
            "runtime_permuted": runtime,
            "folded": folded,
            "smoothed": any(layer.smoothed for layer in pruned.rounded),
        }
    )
