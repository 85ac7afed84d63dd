"""What a prune writes: the checkpoint, and what lies beside it until that is complete."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from permllm_offline.forecast.memory import passed_bytes, scratch_bytes
from permllm_offline.forecast.memory_fit import SMALLER, gigabytes
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.prepared import Prepared, calibration_windows, windows_to_come
from permllm_offline.pruning.in_memory import needs_hidden_states
from permllm_offline.pruning.streamed import can_stream
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.processes import local_count
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.output import check_disk

INTERVAL_BYTES = 3 * 4 + 4
"""Per kept weight in the state of a distillation: float32 weight, two moments, and the best one."""

INTERVAL_FILES = 2
"""Kept states of an unfinished step while one takes the place of the last."""


def disk_bytes(recipe: Recipe, prepared: Prepared) -> int:
    """Bytes of the output, and of the finished steps and scratch files beside it."""
    plan = prepared.plan
    reconstruction = parts_of(recipe).reconstruction
    needed = prepared.output_bytes + local_count() * scratch_bytes(recipe, prepared)
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
        states = tokens * plan.hidden_size * prepared.dtype.itemsize
        needed += INTERVAL_FILES * states
    return needed


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
        options = " ".join(f"--{name} {value}" for name, value in SMALLER.items())
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
