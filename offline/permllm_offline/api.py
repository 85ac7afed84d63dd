"""The commands ``prune`` and ``eval`` as functions."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from permllm_offline import pipeline
from permllm_offline.errors import OfflineError
from permllm_offline.hub import check_push, push
from permllm_offline.model.loading import (
    load_model,
    load_served,
    open_source,
    parse_device,
    parse_dtype,
)
from permllm_offline.model.quantized import require_read
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.recipe_input import read_recipe
from permllm_offline.preparation.target import Target, recipe_for
from permllm_offline.recipe.entries import (
    BlockwiseEntries,
    DistillationEntries,
    LearningEntries,
)
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report.report import Report
from permllm_offline.run.device import chosen_device, warn_of_unused_gpu
from permllm_offline.run.local_path import local_path
from permllm_offline.run.processes import first
from permllm_offline.text.evaluation import evaluation_windows as cut_windows
from permllm_offline.text.evaluation import perplexity
from permllm_offline.text.paper_protocol import LENGTHS, Protocol
from permllm_offline.text.row_text import TEXT_FIELD
from permllm_offline.text.windows import Sampling
from permllm_offline.text.zero_shot import Tasks
from permllm_offline.unused_options import warn_of_no_use

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a checkpoint.

    ``perplexity`` is that over ``windows`` windows of ``sequence_length`` tokens, or None without
    a data set, and ``protocol`` says how the text was read; ``tasks`` is task -> metric -> value.
    """

    perplexity: float | None
    windows: int
    sequence_length: int
    tasks: Mapping[str, Mapping[str, float]]
    protocol: Protocol = "rows"


def prune(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    recipe: str | PathLike[str] | None = None,
    preset: Literal["paper"] | None = None,
    method: str | None = None,
    reconstruction: str | None = None,
    pattern: Literal["2:4", "4:8", "8:16", "32:64"] | None = None,
    target: Target | None = None,
    block_size: Literal[32, 64, 128] | None = None,
    ignore: Sequence[str] | None = None,
    dataset: str | PathLike[str] | Sequence[str | PathLike[str]] | None = None,
    text_field: str | None = None,
    num_samples: int | None = None,
    sampling: Sampling | None = None,
    sequence_length: int | None = None,
    evaluation_windows: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] | None = None,
    values: Literal["auto", "int8", "int4"] | None = None,
    smoothing: bool | None = None,
    learning: LearningEntries | None = None,
    blockwise: BlockwiseEntries | None = None,
    distillation: DistillationEntries | None = None,
    effort: Literal["low", "default", "high"] | None = None,
    push_to_hub: str | None = None,
    force: bool = False,
    restart: bool = False,
) -> Report:
    """Prune a model and write a permllm checkpoint, like ``permllm-offline prune``.

    An argument that is None is taken from the effort where one is given, then from the recipe file,
    then from the preset, then from the default effort and the defaults of ``recipe.schema.Recipe``.

    Args:
        model: folder or hub name of the dense model.
        output: folder to write; it is complete or absent.
        recipe: YAML file of options, such as the ``recipe.yaml`` of a checkpoint.
        preset: ``paper`` for the constants of arXiv 2510.10136, which take GPU hours.
        method: key of ``recipe.methods.METHODS``; one that does not fit this
            machine's memory is refused.
        reconstruction: key of ``reconstruction.kinds.RECONSTRUCTIONS``, not the method's own.
        pattern: N:M; by default that of the target.
        target: what is to serve the checkpoint: ``amx`` for 32:64, ``cpu`` for 8:16 or ``gpu`` for
            2:4; by default ``auto``, what this machine is, where nothing else says a pattern.
        block_size: channels per permutation block.
        ignore: linear layers that stay dense: names in full, or ``re:`` and a regular expression
            that matches whole ones, as in the checkpoint's own ``ignore``.
        dataset: calibration text: a file, a folder or a hub name, or several of them.
        text_field: field of a row that holds the text, or messages; see ``text.row_text.RowText``.
        num_samples: calibration windows.
        sampling: ``stream`` or ``document``; see ``text.windows.sample_windows``.
        sequence_length: tokens per window.
        evaluation_windows: held-out windows on which the report's perplexities are measured.
        seed: of sampling and learning.
        device: torch device; the CPU by default, with a warning where there is a GPU.
        dtype: of the weights; ``auto`` is the model's own.
        values: ``int8`` stores kept weights with a scale per output row, ``int4`` with a multiplier
            per row and 64 inputs as well; see ``sparsity.int4_values``.
        smoothing: whether integer values meet evened-out inputs; see ``sparsity.smoothing``.
        learning: constants of the learned permutation, some fields of ``LearningRecipe``.
        blockwise: constants of tuning layer by layer, some fields of ``BlockwiseRecipe``.
        distillation: constants of the distillation, some fields of ``DistillationRecipe``.
        effort: calibration text and steps of a method that distils.
        push_to_hub: ``owner/name`` of a repository to upload the finished checkpoint to.
        force: replace a checkpoint in the output folder.
        restart: remove finished steps of a run that was cut off, from which the same call goes on
            otherwise.

    Returns:
        The report, which is also written to ``report.json``.

    Raises:
        OfflineError, CheckpointError: bad input, or an output that cannot be written or uploaded.
    """
    changes = {
        "model": _model_name(model),
        "method": method,
        "reconstruction": reconstruction,
        "pattern": pattern,
        "block_size": block_size,
        "ignore": ignore,
        "dataset": _datasets(dataset),
        "text_field": text_field,
        "num_samples": num_samples,
        "sampling": sampling,
        "sequence_length": sequence_length,
        "evaluation_windows": evaluation_windows,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "values": values,
        "smoothing": smoothing,
        "learning": learning,
        "blockwise": blockwise,
        "distillation": distillation,
    }
    folder = local_path(output)
    made = asked_recipe(
        changes,
        recipe,
        output=folder,
        target=target,
        effort=effort,
        preset=preset,
        push_to_hub=push_to_hub,
    )
    report, _ = prune_and_push(made, folder, push_to_hub=push_to_hub, force=force, restart=restart)
    return report


def prune_and_push(
    recipe: Recipe,
    output: Path,
    *,
    push_to_hub: str | None = None,
    force: bool = False,
    restart: bool = False,
) -> tuple[Report, str | None]:
    """Prune by a recipe, and upload the finished checkpoint where that is asked for.

    Returns:
        The report, and the address of what this process uploaded, or None.

    Raises:
        OfflineError, CheckpointError: bad input, or an output that cannot be written or uploaded.
    """
    report = pipeline.prune(recipe, output, force=force, restart=restart)
    if push_to_hub is None or not first():
        return report, None
    address = push(output, push_to_hub)
    logger.info("uploaded: %s", address)
    return report, address


def asked_recipe(
    changes: Mapping[str, Any],
    file: str | PathLike[str] | None = None,
    *,
    output: Path | None = None,
    target: str | None = None,
    effort: str | None = None,
    preset: str | None = None,
    push_to_hub: str | None = None,
) -> Recipe:
    """The recipe that a user asks for; what is of no use to its method is named in a warning.

    Args:
        changes: entries that come before those of the file; None says nothing.
        file: YAML file of options.
        output: folder to write, which must not take the file away.
        target: as for ``preparation.target.recipe_for``.
        effort: as for ``preparation.recipe_input.make_recipe``.
        preset: as for ``preparation.recipe_input.make_recipe``.
        push_to_hub: repository to which the checkpoint is to go.

    Raises:
        OfflineError: bad input, or a repository that cannot be written.
        CheckpointError: the file lies in the output.
    """
    if file is not None and output is not None:
        pipeline.check_recipe_file(local_path(file), output)
    recorded = None if file is None else read_recipe(local_path(file))
    made = recipe_for(target, changes, effort, preset, recorded)
    warn_of_no_use(made, changes, effort)
    if push_to_hub is not None:
        check_push(push_to_hub, made.model)
    if "device" not in made.model_fields_set:
        warn_of_unused_gpu()
    return made


def evaluate(
    model: str | PathLike[str],
    dataset: str | PathLike[str] | None = None,
    *,
    text_field: str = TEXT_FIELD,
    protocol: Protocol = "rows",
    sequence_length: int | None = None,
    max_windows: int | None = None,
    tasks: str | Sequence[str] | None = None,
    tasks_path: str | PathLike[str] | None = None,
    few_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str | None = None,
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
) -> Evaluation:
    """Measure perplexity and tasks of a dense or permllm checkpoint, like ``permllm-offline eval``.

    Perplexity is that of the weights, whatever will multiply them. Tasks are answered as vLLM would
    answer on this device and in this dtype: the kernels multiply, and round what they round.

    Args:
        model: folder or hub name.
        dataset: text to measure perplexity on: a file, a folder or a hub name.
        text_field: field of a row that holds the text, or messages; see ``text.row_text.RowText``.
        protocol: ``rows`` tokenizes each row alone; ``paper`` reads ``wikitext2`` and ``c4`` as
            papers do, see ``text.paper_protocol``.
        sequence_length: tokens per window, by default 512, or 2048 with ``paper``; windows do not
            overlap.
        max_windows: windows at most, or None for the whole text, as far as
            ``text.windows.MAX_TOKENS`` go.
        tasks: of lm-eval; names, or one text with commas between them.
        tasks_path: folder of more tasks; see ``text.zero_shot.Tasks``.
        few_shot: examples before each question of a task, or None for what it says.
        limit: questions of each task, or None for all.
        batch_size: of the tasks.
        device: torch device; the CPU by default, with a warning where there is a GPU.
        dtype: of the weights; ``auto`` is the model's own.

    Raises:
        OfflineError, CheckpointError: bad input.
    """
    if dataset is None and tasks is None:
        raise OfflineError("nothing to measure: give --dataset, --tasks, or both.")
    if protocol not in LENGTHS:
        raise OfflineError(f"protocol {protocol!r} is not known: give {' or '.join(LENGTHS)}.")
    of_text = {
        "--max-windows": max_windows, "--sequence-length": sequence_length,
        "--protocol": protocol, "--text-field": text_field,
    }  # fmt: skip
    if sequence_length is None:
        sequence_length = LENGTHS[protocol]
    if sequence_length < 2:
        raise OfflineError(f"--sequence-length {sequence_length}: a window has at least 2 tokens.")
    if max_windows is not None and max_windows < 1:
        raise OfflineError(f"--max-windows {max_windows}: give at least 1, or leave it out.")
    if batch_size < 1 or (few_shot or 0) < 0 or (limit is not None and limit < 1):
        raise OfflineError(
            f"batch size {batch_size}, few-shot {few_shot} and limit {limit} cannot be evaluated: "
            "--batch-size and --limit must be at least 1, --few-shot at least 0."
        )
    for option, value in of_text.items() if dataset is None else ():
        if value not in (None, "rows", TEXT_FIELD):
            raise OfflineError(
                f"{option} {value} is about perplexity, and there is no text for it: give one with "
                "--dataset, or leave the option out."
            )
    if tasks is None and tasks_path is not None:
        raise OfflineError("--tasks-path says where tasks are: give their names with --tasks.")
    if tasks is None and (few_shot is not None or limit is not None):
        option = f"--limit {limit}" if few_shot is None else f"--few-shot {few_shot}"
        raise OfflineError(
            f"{option} is about the questions of tasks, and there are none: give their names with "
            "--tasks, or leave it out."
        )
    if isinstance(tasks, str):
        tasks = [name.strip() for name in tasks.split(",") if name.strip()]
    torch_device, name = parse_device(chosen_device(device)), _model_name(model)
    source = open_source(name, lambda config: require_read(name, config.to_dict()))
    torch_dtype = parse_dtype(dtype) or source.dtype
    tokenizer = load_tokenizer(source)
    found = None
    if tasks is not None:
        found = Tasks(tasks, None if tasks_path is None else local_path(tasks_path))
    windows = None
    if dataset is not None:
        windows = cut_windows(
            fspath(dataset),
            tokenizer,
            sequence_length,
            max_windows,
            protocol=protocol,
            text_field=text_field,
        )
    measured, scores = None, {}
    if windows is not None:
        measured = perplexity(load_model(source, torch_dtype, torch_device), windows)
    if found is not None:
        served = load_served(source, torch_dtype, torch_device)
        scores = found.evaluate(
            served, tokenizer, few_shot=few_shot, limit=limit, batch_size=batch_size
        )
    count = 0 if windows is None else len(windows)
    return Evaluation(measured, count, sequence_length, scores, protocol)


def _model_name(model: str | PathLike[str]) -> str:
    if not isinstance(model, str | PathLike):
        raise OfflineError(
            f"the model is a {type(model).__name__} in memory: give the folder or hub name that it "
            "can be read from."
        )
    return fspath(model)


def _datasets(
    dataset: str | PathLike[str] | Sequence[str | PathLike[str]] | None,
) -> str | tuple[str, ...] | None:
    if dataset is None or isinstance(dataset, str):
        return dataset
    if isinstance(dataset, PathLike):
        return fspath(dataset)
    return tuple(fspath(one) for one in dataset)
