"""Check a recipe against the model and the data before any work starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import (
    Source,
    open_source,
    parse_device,
    parse_dtype,
    written_dtype,
)
from permllm_offline.model.lookup import family_of, inner_family
from permllm_offline.model.prune_plan import Plan, make_plan
from permllm_offline.model.quantized import require_dense
from permllm_offline.model.stored import bytes_beside
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.permutation.learned_layers import parse_layers
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.processes import from_first
from permllm_offline.text.own_text import OwnText
from permllm_offline.text.windows import CalibrationWindows, check_datasets, sample_windows


@dataclass(frozen=True)
class Prepared:
    """Everything that is checked before any work starts."""

    source: Source
    dtype: torch.dtype
    """Of the model to be written."""
    device: torch.device
    plan: Plan
    windows: CalibrationWindows | None
    tokenizer: Any = None
    """Of the model, where the recipe names calibration text."""
    asked_dtype: torch.dtype | None = None
    """What dense tensors become; None where the recipe asks for nothing, so that they stay."""

    @cached_property
    def output_bytes(self) -> int:
        """Bytes of the checkpoint's tensors, what is beside the language model included."""
        return self.plan.total_bytes + bytes_beside(self.source, self.asked_dtype)


def prepare(recipe: Recipe) -> Prepared:
    """Check a recipe against the model and the data.

    No weight is read, but where the model writes calibration text itself.

    Raises:
        OfflineError, CheckpointError: the first thing that would make the prune fail.
    """
    return with_text(recipe, prepare_model(recipe))


def open_prunable(recipe: Recipe) -> Source:
    """Open the model of a recipe; what its configuration and the recipe forbid comes first.

    Raises:
        OfflineError, CheckpointError: the model is unknown, of no family that is supported, or
            quantized in a form that is not read; there is no text for the method, or no such
            device. No weight was fetched.
    """

    def check(config: Any) -> None:
        require_dense(recipe.model, config.to_dict(), "prune")
        if inner_family(config) is None:
            family_of(config)
        if not recipe.datasets and parts_of(recipe).reads_text:
            raise OfflineError(
                f"method {recipe.method!r} needs calibration text: give --dataset a file, a folder "
                "or a hub name."
            )
        parse_device(recipe.device)

    return open_source(recipe.model, check)


def prepare_model(recipe: Recipe) -> Prepared:
    """Check what a recipe says, and its model; no calibration text is read yet.

    Raises:
        OfflineError, CheckpointError: the first thing that would make the prune fail.
    """
    parts = parts_of(recipe)
    device = parse_device(recipe.device)
    source = open_prunable(recipe)
    dtype = written_dtype(source, recipe.dtype)
    plan = make_plan(
        source,
        recipe.parsed_pattern(),
        None if parts.permutation.across_blocks else recipe.block_size,
        permuted=parts.permutation.permutes,
        dtype=dtype,
        values=recipe.values,
        ignore=recipe.ignore,
    )
    if parts.permutation.learns:
        parse_layers(recipe.learning.layers, len(plan.layers), plan.pruned_layers)
    tokenizer = None
    if recipe.datasets:
        check_datasets(recipe.datasets, recipe.num_samples)
        tokenizer = load_tokenizer(source)
    return Prepared(source, dtype, device, plan, None, tokenizer, parse_dtype(recipe.dtype))


def with_text(
    recipe: Recipe, prepared: Prepared, own: Callable[[int], Tensor] | None = None
) -> Prepared:
    """Draw the calibration text of a recipe, or have the model write it.

    Args:
        recipe: of the prune.
        prepared: its model.
        own: gives so many windows of the data set ``self`` in place of the model.

    Raises:
        OfflineError, CheckpointError: text or weights that cannot be used.
    """
    if not recipe.datasets:
        return prepared
    draw = partial(
        sample_windows,
        recipe.datasets,
        prepared.tokenizer,
        num_samples=recipe.num_samples,
        sequence_length=recipe.sequence_length,
        seed=recipe.seed,
        num_held_out=recipe.evaluation_windows,
        sampling=recipe.sampling,
        text_field=recipe.text_field,
        own_text=own or own_text(recipe, prepared).windows,
    )
    return replace(prepared, windows=from_first(draw))


def windows_to_come(recipe: Recipe) -> CalibrationWindows | None:
    """As many windows as the calibration text will have at most, without contents."""
    if not recipe.datasets:
        return None
    counts = recipe.num_samples, recipe.evaluation_windows
    return CalibrationWindows(*(without_contents(recipe, "meta", count) for count in counts))


def without_contents(recipe: Recipe, device: str, windows: int) -> Tensor:
    """So many windows of the recipe's length."""
    return torch.empty((windows, recipe.sequence_length), dtype=torch.long, device=device)


def calibration_windows(recipe: Recipe) -> int:
    """Windows to calibrate on, those that the dense model writes for its distillation included."""
    distils = parts_of(recipe).reconstruction.distils
    return recipe.num_samples + (recipe.distillation.self_windows if distils else 0)


def own_text(recipe: Recipe, prepared: Prepared) -> OwnText:
    """The text of the data set ``self``."""
    source, dtype, device = prepared.source, prepared.dtype, prepared.device
    return OwnText(source, dtype, device, recipe.sequence_length, recipe.seed)
