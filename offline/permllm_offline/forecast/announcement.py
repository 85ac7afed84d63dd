"""What a prune will take, in a few lines: shown by a dry run, and before the first step."""

from __future__ import annotations

import logging
import sys

import torch
from tqdm import tqdm

from permllm_offline.forecast.duration import SENSITIVITY, Forecast, dtype_gain, forecast
from permllm_offline.forecast.room import disk_bytes
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.recipe.schema import Recipe

logger = logging.getLogger(__name__)

MUCH_FASTER = 2
"""How many times as fast products of another dtype are before a user is told of it."""


def announce(recipe: Recipe, prepared: Prepared, *, goes_on: bool = False) -> None:
    """Say what a prune will take, where progress is shown; never fails.

    Args:
        recipe: of the prune.
        prepared: its model, and windows that may be without contents.
        goes_on: whether finished steps are there, which the forecast does not know of.
    """
    try:
        expected = forecast(recipe, prepared)
        lines = expected_lines(recipe, prepared, expected)
        if goes_on:
            lines[0] += "; in all: finished steps are not repeated"
        warn_of_slow_float16(recipe, prepared)
    except Exception as error:  # the prune may go well all the same
        logger.info("nothing can be said of time and memory: %s", error)
        return
    tqdm.write("\n".join(lines), file=sys.stderr)


def expected_lines(recipe: Recipe, prepared: Prepared, expected: Forecast) -> list[str]:
    """Time, memory and disk, a line each."""
    stages = "".join(
        f", {duration(seconds)} for {stage}" for stage, seconds in expected.stage_seconds.items()
    )
    cost = (
        f"about {duration(expected.seconds)}: {duration(sum(expected.layer_seconds))} for "
        f"decoder layers one by one{stages} (estimates from a layer timed on this machine; "
        "the bars below correct them)"
    )
    if SENSITIVITY in expected.stage_seconds:
        cost += (
            f"; which layers {recipe.learning.layers} takes is known after {SENSITIVITY}: learning "
            "is the mean over all choices"
        )
    memory = expected.memory
    held = (
        f"peak memory about {memory.peak_bytes / 1e9:,.2f} GB beside the program: "
        f"{memory.common / 1e9:,.2f} GB and what a decoder layer holds, or "
        f"{memory.outside / 1e9:,.2f} GB outside of them"
    )
    room = (
        f"at most {disk_bytes(recipe, prepared) / 1e9:,.2f} GB of disk: the checkpoint, and what "
        "a run that is cut off goes on from"
    )
    return [cost, held, room]


def warn_of_slow_float16(recipe: Recipe, prepared: Prepared) -> None:
    """Name bfloat16 where this CPU multiplies it much faster than the float16 of a model."""
    if prepared.dtype != torch.float16 or prepared.device.type != "cpu":
        return
    gain = dtype_gain(prepared, torch.bfloat16)
    if gain < MUCH_FASTER:
        return
    rounded = "" if recipe.values != "auto" else ", to which its kernels round kept values anyway"
    logger.warning(
        "the dtype is float16, and this CPU multiplies bfloat16 about %.0f times as fast (one "
        "layer, timed now)%s: --dtype bfloat16 prunes sooner",
        gain,
        rounded,
    )


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 60:
        return f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 3600 else f"{seconds / 3600:.1f} h"
