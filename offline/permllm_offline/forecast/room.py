"""Whether memory and disk have room for what a prune holds and writes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from permllm_offline.errors import OfflineError
from permllm_offline.forecast.memory import passed_bytes, peak_bytes
from permllm_offline.preparation.method_parts import parts_of, title_of
from permllm_offline.preparation.prepared import Prepared, calibration_windows, windows_to_come
from permllm_offline.pruning.in_memory import needs_hidden_states
from permllm_offline.pruning.streamed import can_stream
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.memory_limit import free_bytes, memory_bytes
from permllm_offline.run.processes import first, local_count
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.output import check_disk

logger = logging.getLogger(__name__)

SMALLER = {"method": "wanda+cp", "reconstruction": "obs+blockwise"}
"""The best that holds one decoder layer in memory at a time."""

SMALLEST = ({"method": "wanda+cp"}, {"method": "magnitude"})
"""What needs less, the better one first."""

PROGRAM_BYTES = 1 << 30
"""Python with its libraries, and a little for the system."""

INTERVAL_BYTES = 3 * 4 + 4
"""Per kept weight in the state of a distillation: float32 weight, two moments, and the best one."""

INTERVAL_FILES = 2
"""Kept states of an unfinished step while one takes the place of the last."""


def disk_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Bytes of the output, and of the finished steps beside it."""
    plan = prepared.plan
    reconstruction = parts_of(recipe).reconstruction
    needed = prepared.output_bytes
    if can_stream(recipe) or reconstruction.layer is not None:
        # Finished layers, a bit for each element of their masks.
        needed += sum(linear.dense_bytes for linear in plan.every_linear)
        needed += math.ceil(sum(linear.weights for linear in plan.linears) / 8)
    if can_stream(recipe):
        to_come = replace(prepared, windows=windows_to_come(recipe))
        needed += INTERVAL_FILES * passed_bytes(recipe, to_come)
    needed += _distillation_bytes(recipe, prepared)
    if needs_hidden_states(recipe):
        tokens = calibration_windows(recipe) * recipe.sequence_length
        needed += tokens * plan.hidden_size * prepared.dtype.itemsize
    return needed


def check_memory(recipe: Recipe, prepared: Prepared) -> None:
    """Check that this machine, or the GPU that the recipe names, can hold a prune.

    The machine's memory decides, not what other programs leave of it, which is worth a warning: so
    a run that was cut off is resumed whatever runs beside it.

    Raises:
        OfflineError: it cannot; the message names a method that it can hold.
    """
    memory, needed = memory_bytes(prepared.device), _needed(recipe, prepared)
    if memory is not None and needed > memory:
        machine = "this machine" if local_count() == 1 else f"each of {local_count()} processes"
        raise OfflineError(
            f"{title_of(recipe)} needs about {gigabytes(needed)} of memory, and {machine} has "
            f"{gigabytes(memory)}: {_remedy(recipe, prepared, memory)}."
        )
    free = free_bytes() if prepared.device.type == "cpu" and first() else None
    if free is not None and needed > free:
        logger.warning(
            "%s needs about %s of memory, and other programs leave %s free: it may be slow or be "
            "killed. End some of them first, or %s.",
            title_of(recipe),
            gigabytes(needed),
            gigabytes(free),
            _remedy(recipe, prepared, free),
        )


def _remedy(recipe: Recipe, prepared: Prepared, memory: int) -> str:
    """Options of the best method that fits, or what makes any of them smaller."""
    for options in (SMALLER, *SMALLEST):
        other = recipe.model_copy(update={"reconstruction": None} | options)
        if (needed := _needed(other, prepared)) <= memory:
            return f"give {_options(options)}, which needs about {gigabytes(needed)}"
    return "give fewer --num-samples, a shorter --sequence-length, or take a larger machine"


def _needed(recipe: Recipe, prepared: Prepared) -> int:
    return PROGRAM_BYTES + peak_bytes(recipe, prepared)


def _options(entries: Mapping[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in entries.items())


def gigabytes(size: int) -> str:
    """A number of bytes as messages say it."""
    return f"{size / 1e9:.3g} GB"


def check_room(recipe: Recipe, prepared: Prepared, output: Path, kept: int) -> None:
    """Raise CheckpointError where the disk has too little room for a prune.

    Args:
        recipe: of the prune.
        prepared: its model.
        output: folder to write.
        kept: bytes in the work folder that the prune uses again, or removes.
    """
    try:
        check_disk(output, disk_bytes(recipe, prepared) - kept)
    except CheckpointError as error:
        states = _distillation_bytes(recipe, prepared)
        if not states:
            raise
        smaller = recipe.model_copy(update=SMALLER)
        options = _options(SMALLER)
        if kept:  # steps that a run of another method is refused for
            options += " --restart"
        raise CheckpointError(
            f"{error}. The state of the distillation takes {gigabytes(states)} in all, from which "
            f"a run that is killed goes on: {INTERVAL_FILES} x {INTERVAL_BYTES} bytes for each "
            f"kept weight, in a hidden folder beside the output. {options} distils nothing and "
            f"may take {gigabytes(disk_bytes(smaller, prepared))} in all"
        ) from error


def _distillation_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Of the kept states of an unfinished distillation."""
    if not parts_of(recipe).reconstruction.distils:
        return 0
    kept = sum(linear.weights for linear in prepared.plan.linears) // 2
    return INTERVAL_FILES * INTERVAL_BYTES * kept
