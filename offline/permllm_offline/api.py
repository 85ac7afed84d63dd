"""The commands ``prune`` and ``eval`` as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal

from permllm_offline import pipeline
from permllm_offline.calibration import Sampling
from permllm_offline.errors import OfflineError
from permllm_offline.evaluation import evaluation_windows, perplexity
from permllm_offline.loading import (
    load_model,
    load_tokenizer,
    open_source,
    parse_device,
    parse_dtype,
)
from permllm_offline.recipe import Recipe, make_recipe
from permllm_offline.report import Report

_DEFAULT = {name: field.default for name, field in Recipe.model_fields.items()}


@dataclass(frozen=True)
class Evaluation:
    """Perplexity of a checkpoint over ``windows`` windows of ``sequence_length`` tokens."""

    perplexity: float
    windows: int
    sequence_length: int


def prune(
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    method: str = _DEFAULT["method"],
    reconstruction: str | None = None,
    pattern: Literal["2:4", "4:8"] = _DEFAULT["pattern"],
    block_size: Literal[32, 64, 128] = _DEFAULT["block_size"],
    dataset: str | PathLike[str] | Sequence[str] | None = None,
    num_samples: int | None = None,
    sampling: Sampling = _DEFAULT["sampling"],
    sequence_length: int = _DEFAULT["sequence_length"],
    evaluation_windows: int = _DEFAULT["evaluation_windows"],
    seed: int = _DEFAULT["seed"],
    device: str = _DEFAULT["device"],
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _DEFAULT["dtype"],
    values: Literal["auto", "int8"] = _DEFAULT["values"],
    learning: Mapping[str, Any] | None = None,
    blockwise: Mapping[str, Any] | None = None,
    distillation: Mapping[str, Any] | None = None,
    effort: Literal["low", "default", "high"] = "default",
    force: bool = False,
    resume: bool = False,
) -> Report:
    """Prune a model and write a permllm checkpoint, like ``permllm-offline prune``.

    Args:
        model: folder or hub name of the dense model.
        output: folder to write; it is complete or absent.
        method: key of ``methods.METHODS``.
        reconstruction: key of ``reconstructions.RECONSTRUCTIONS`` in place of the method's own.
        pattern: N:M.
        block_size: channels per permutation block.
        dataset: calibration text: a file, a folder or a hub name, or several of them.
        num_samples: calibration windows, or None for the default.
        sampling: ``stream`` or ``document``; see ``calibration.sample_windows``.
        sequence_length: tokens per window.
        evaluation_windows: held-out windows on which the report's perplexities are measured.
        seed: of sampling and learning.
        device: torch device.
        dtype: of the weights; ``auto`` is the model's own.
        values: ``int8`` stores kept weights with a scale per output row.
        learning: constants of the learned permutation, fields of ``recipe.LearningRecipe``.
        blockwise: constants of tuning layer by layer, fields of ``recipe.BlockwiseRecipe``.
        distillation: constants of the distillation, fields of ``recipe.DistillationRecipe``.
        effort: calibration text and steps of a method that distils, where not given otherwise.
        force: replace a non-empty output folder.
        resume: go on from the finished steps of a run that was cut off.

    Returns:
        The report, which is also written to ``report.json``.

    Raises:
        OfflineError, CheckpointError: bad input, or an output that cannot be written.
    """
    entries = {
        "model": fspath(model),
        "method": method,
        "reconstruction": reconstruction,
        "pattern": pattern,
        "block_size": block_size,
        "dataset": _datasets(dataset),
        "num_samples": num_samples,
        "sampling": sampling,
        "sequence_length": sequence_length,
        "evaluation_windows": evaluation_windows,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "values": values,
        "learning": learning,
        "blockwise": blockwise,
        "distillation": distillation,
    }
    recipe = make_recipe(entries, effort)
    return pipeline.prune(recipe, Path(output), force=force, resume=resume)


def evaluate(
    model: str | PathLike[str],
    dataset: str | PathLike[str],
    *,
    sequence_length: int = 512,
    max_windows: int | None = None,
    device: str = "cpu",
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto",
) -> Evaluation:
    """Measure the perplexity of a dense or permllm checkpoint, like ``permllm-offline eval``.

    Args:
        model: folder or hub name.
        dataset: text to evaluate on: a file, a folder or a hub name.
        sequence_length: tokens per window; windows do not overlap.
        max_windows: windows at most, or None for the whole text.
        device: torch device.
        dtype: of the weights; ``auto`` is the model's own.

    Raises:
        OfflineError, CheckpointError: bad input.
    """
    if sequence_length < 2 or (max_windows is not None and max_windows < 1):
        raise OfflineError(
            f"sequence length {sequence_length} and {max_windows} windows cannot be evaluated: "
            "--sequence-length must be at least 2 and --max-windows at least 1."
        )
    torch_device, source = parse_device(device), open_source(fspath(model))
    torch_dtype = parse_dtype(dtype) or source.dtype
    windows = evaluation_windows(
        fspath(dataset), load_tokenizer(source), sequence_length, max_windows
    )
    found = perplexity(load_model(source, torch_dtype, torch_device), windows)
    return Evaluation(found, len(windows), sequence_length)


def _datasets(
    dataset: str | PathLike[str] | Sequence[str] | None,
) -> str | tuple[str, ...] | None:
    if dataset is None:
        return None
    if isinstance(dataset, str | PathLike):
        return fspath(dataset)
    return tuple(dataset)
