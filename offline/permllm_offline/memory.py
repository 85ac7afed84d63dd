"""Whether a prune fits the memory of this machine; where the default does not, what replaces it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from permllm_offline.memory_forecast import peak_bytes, scratch_bytes
from permllm_offline.preparation import Prepared
from permllm_offline.recipe import Recipe
from permllm_offline.run.processes import local_count

logger = logging.getLogger(__name__)

SMALLER = {"method": "wanda+cp", "reconstruction": "obs+blockwise"}
"""The best that holds one decoder layer in memory at a time."""

ON_DISK = {"scratch": "disk"}

PROGRAM_BYTES = 1 << 30
"""Python with its libraries, and a little for the system."""

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux says what a container may use, version 2 and version 1."""


@dataclass(frozen=True)
class Fitted:
    """A recipe, and what to tell of it where it took the place of the default one."""

    recipe: Recipe
    note: str | None = None


def fitted(recipe: Recipe, prepared: Prepared, memory: int | None = None) -> Fitted:
    """Make a recipe fit: the default method may be replaced, and scratch may move to the disk.

    A method, or a reconstruction, that the recipe names is never replaced, nor a place of scratch:
    where nothing helps, a warning says what it needs. The machine's memory decides, not what other
    programs leave of it, so that a run that was cut off is resumed as what it was.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        memory: bytes; None reads those of the machine, or of the GPU that the recipe names.
    """
    memory = memory_bytes(prepared.device) if memory is None else memory

    def needed(candidate: Recipe) -> int:
        return PROGRAM_BYTES + peak_bytes(candidate, prepared)

    if memory is None or needed(recipe) <= memory:
        return Fitted(recipe)
    machine = "this machine" if local_count() == 1 else f"each of {local_count()} processes here"
    found = (
        f"{recipe.method} needs about {_gigabytes(needed(recipe))} of memory here, and {machine} "
        f"has {_gigabytes(memory)}"
    )
    is_default = "method" not in recipe.model_fields_set and recipe.reconstruction is None
    smaller = recipe.model_copy(update=SMALLER)
    candidates = [smaller, *_on_disk(smaller, prepared)] if is_default else []
    candidates = candidates or _on_disk(recipe, prepared)
    fitting = [candidate for candidate in candidates if needed(candidate) <= memory]
    if is_default or fitting:
        taken = fitting[0] if fitting else candidates[-1]
        note = f"{found}: {_instead(recipe, taken, prepared, needed(taken))}"
        logger.warning("%s", note)
        return Fitted(taken, note)
    remedy = "fewer --num-samples, a shorter --sequence-length, or a larger machine"
    if (enough := needed(smaller)) < needed(recipe):
        remedy = f"{_options(SMALLER)}, which needs about {_gigabytes(enough)}"
    logger.warning("%s: it may be killed. The remedy is %s.", found, remedy)
    return Fitted(recipe)


def _on_disk(recipe: Recipe, prepared: Prepared) -> list[Recipe]:
    """The recipe with its scratch on disk, if it has any and does not say where it lies."""
    on_disk = recipe.model_copy(update=ON_DISK)
    given = "scratch" in recipe.model_fields_set
    return [] if given or not scratch_bytes(on_disk, prepared) else [on_disk]


def _instead(recipe: Recipe, taken: Recipe, prepared: Prepared, needed: int) -> str:
    """Say what takes the place of a recipe."""
    files = scratch_bytes(taken, prepared)
    beside = f", with {_gigabytes(files)} in files beside the output" if files else ""
    needs = f"which needs about {_gigabytes(needed)}{beside}"
    if taken.method == recipe.method:
        return f"{_options(ON_DISK)} is taken, {needs}. The result is the same."
    options = _options(SMALLER | (ON_DISK if files else {}))
    remedy = f"Give --method {recipe.method} to have it all the same."
    return f"{options} takes its place, {needs}. {remedy}"


def memory_bytes(device: torch.device) -> int | None:
    """Bytes of memory of a device; of the host, the share of this process in what it may use.

    None where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    try:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
    limits = [limit for file in _LIMITS if (limit := _limit(Path(file))) is not None]
    return min([host, *limits]) // local_count()


def _limit(file: Path) -> int | None:
    """What a control group allows; None where there is none, or no limit."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _options(names: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in names.items())


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
