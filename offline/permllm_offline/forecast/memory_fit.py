"""Whether a prune fits the memory of this machine; where the default does not, what replaces it."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from permllm_offline.forecast.memory import peak_bytes, scratch_bytes
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.memory_limit import free_bytes, memory_bytes
from permllm_offline.run.processes import first, local_count

logger = logging.getLogger(__name__)

SMALLER = {"method": "wanda+cp", "reconstruction": "obs+blockwise"}
"""The best that holds one decoder layer in memory at a time."""

PROGRAM_BYTES = 1 << 30
"""Python with its libraries, and a little for the system."""


@dataclass(frozen=True)
class Fitted:
    """A recipe, and what to tell of it where it took the place of the default one."""

    recipe: Recipe
    note: str | None = None


def fitted(recipe: Recipe, prepared: Prepared, memory: int | None = None) -> Fitted:
    """Make a recipe fit: the default method may be replaced, and scratch may move to the disk.

    A method, or a reconstruction, that the recipe names is never replaced, nor a place of scratch:
    where nothing helps, a warning says what would. The machine's memory decides, not what other
    programs leave of it, so that a run that was cut off is resumed as what it was.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        memory: bytes; None reads those of the machine, or of the GPU that the recipe names.
    """
    memory = memory_bytes(prepared.device) if memory is None else memory
    needed = _needed(recipe, prepared)
    if memory is None or needed <= memory:
        return Fitted(recipe)
    machine = "this machine" if local_count() == 1 else f"each of {local_count()} processes here"
    found = (
        f"{recipe.method} needs about {gigabytes(needed)} of memory here, and {machine} has "
        f"{gigabytes(memory)}"
    )
    allowed = _allowed(recipe, prepared)
    fitting = [other for other in allowed if _needed(other, prepared) <= memory]
    if not fitting and not is_default(recipe):
        remedy = _remedy(recipe, prepared, memory)
        logger.warning("%s: it may be killed. The remedy is %s.", found, remedy)
        return Fitted(recipe)
    taken = (fitting or allowed)[0]
    note = f"{found}: {_instead(recipe, taken, prepared)}{'' if fitting else ' It may be killed.'}"
    logger.warning("%s", note)
    return Fitted(taken, note)


def warn_of_taken_memory(recipe: Recipe, prepared: Prepared) -> None:
    """Warn where a recipe that fits the machine does not fit what other programs leave of it.

    Args:
        recipe: that of ``fitted``.
        prepared: its model and windows.
    """
    if prepared.device.type != "cpu" or not first():
        return
    free, needed = free_bytes(), _needed(recipe, prepared)
    if free is None or needed <= free or needed > (memory_bytes(prepared.device) or 0):
        return
    logger.warning(
        "%s needs about %s of memory, and other programs leave %s free: it may be slow or be "
        "killed. End some of them first, or the remedy is %s.",
        recipe.method,
        gigabytes(needed),
        gigabytes(free),
        _remedy(recipe, prepared, free),
    )


def is_default(recipe: Recipe) -> bool:
    """Whether nobody asked for its method."""
    return "method" not in recipe.model_fields_set and recipe.reconstruction is None


def gigabytes(size: int) -> str:
    """A number of bytes as messages say it."""
    return f"{size / 1e9:.3g} GB"


def _allowed(recipe: Recipe, prepared: Prepared) -> list[Recipe]:
    """What may take the place of a recipe unasked, the most welcome first."""
    smaller = recipe.model_copy(update=SMALLER)
    allowed = [smaller] if is_default(recipe) else []
    if "scratch" not in recipe.model_fields_set:
        allowed += _on_disk(smaller if is_default(recipe) else recipe, prepared)
    return allowed


def _instead(recipe: Recipe, taken: Recipe, prepared: Prepared) -> str:
    """Say what takes the place of a recipe."""
    options, needs = _options(recipe, taken), _needs(taken, prepared)
    if is_default(recipe):
        remedy = f"Give --method {recipe.method} to have it all the same."
        return f"{options} takes its place, {needs}. {remedy}"
    return f"{options} is taken, {needs}. The result is the same."


def _remedy(recipe: Recipe, prepared: Prepared, memory: int) -> str:
    """What may replace a recipe: the same method if it fits so, else what needs least."""
    smaller = recipe.model_copy(update=SMALLER)
    others = [*_on_disk(recipe, prepared), smaller, *_on_disk(smaller, prepared)]
    others.sort(key=lambda other: max(memory, _needed(other, prepared)))
    if _needed(others[0], prepared) >= _needed(recipe, prepared):
        return "fewer --num-samples, a shorter --sequence-length, or a larger machine"
    return f"{_options(recipe, others[0])}, {_needs(others[0], prepared)}"


def _on_disk(recipe: Recipe, prepared: Prepared) -> list[Recipe]:
    """The recipe with its scratch on disk, if it has any that can lie there."""
    on_disk = recipe.model_copy(update={"scratch": "disk"})
    useful = prepared.device.type == "cpu" and scratch_bytes(on_disk, prepared) > 0
    return [on_disk] if useful and recipe.scratch == "memory" else []


def _needed(recipe: Recipe, prepared: Prepared) -> int:
    return PROGRAM_BYTES + peak_bytes(recipe, prepared)


def _needs(recipe: Recipe, prepared: Prepared) -> str:
    files = scratch_bytes(recipe, prepared)
    beside = f", with {gigabytes(files)} in files beside the output" if files else ""
    return f"which needs about {gigabytes(_needed(recipe, prepared))}{beside}"


def _options(recipe: Recipe, other: Recipe) -> str:
    """The options that make one recipe of another."""
    before, after = (one.model_dump(include={*SMALLER, "scratch"}) for one in (recipe, other))
    return " ".join(f"--{name} {after[name]}" for name in after if after[name] != before[name])
