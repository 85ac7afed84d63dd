"""Whether a prune fits the memory of this machine; where the default does not, what replaces it."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from permllm_offline.memory_forecast import peak_bytes
from permllm_offline.preparation import Prepared
from permllm_offline.recipe import Recipe
from permllm_offline.run.processes import local_count

logger = logging.getLogger(__name__)

SMALLER = {"method": "wanda+cp", "reconstruction": "obs+blockwise"}
"""The best that holds one decoder layer in memory at a time."""

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
    """Replace the default method where this machine has too little memory for it.

    A method, or a reconstruction, that the recipe names is never replaced: a warning says what it
    needs. The machine's memory decides, not what other programs leave of it, so that a run that
    was cut off is resumed as what it was.

    Args:
        recipe: of the prune.
        prepared: its model and windows.
        memory: bytes; None reads those of the machine, or of the GPU that the recipe names.
    """
    memory = memory_bytes(prepared.device) if memory is None else memory
    needed = PROGRAM_BYTES + peak_bytes(recipe, prepared)
    if memory is None or needed <= memory:
        return Fitted(recipe)
    smaller = recipe.model_copy(update=SMALLER)
    enough = PROGRAM_BYTES + peak_bytes(smaller, prepared)
    machine = "this machine" if local_count() == 1 else f"each of {local_count()} processes here"
    found = (
        f"{recipe.method} needs about {_gigabytes(needed)} of memory here, and {machine} has "
        f"{_gigabytes(memory)}"
    )
    if "method" not in recipe.model_fields_set and recipe.reconstruction is None:
        note = (
            f"{found}: {_options(SMALLER)} takes its place, which needs about "
            f"{_gigabytes(enough)}. Give --method {recipe.method} to have it all the same."
        )
        logger.warning("%s", note)
        return Fitted(smaller, note)
    remedy = "fewer --num-samples, a shorter --sequence-length, or a larger machine"
    if enough < needed:
        remedy = f"{_options(SMALLER)}, which needs about {_gigabytes(enough)}"
    logger.warning("%s: it may be killed. The remedy is %s.", found, remedy)
    return Fitted(recipe)


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
