"""Which work folder belongs to a prune, and whether what it holds may be used."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from permllm_offline.preparation import Prepared
from permllm_offline.recipe_schema import Recipe
from permllm_offline.run.steps import WorkFolder
from permllm_vllm.checkpoint.schema import installed_version
from permllm_vllm.checkpoint.shards import CONFIG_NAME


def work_folder(recipe: Recipe, prepared: Prepared, output: Path, *, resume: bool) -> WorkFolder:
    """Open the work folder of an output: ``.NAME.work`` beside it.

    Raises:
        OfflineError: asked to resume a run of another recipe, model, data set or version.
    """
    return WorkFolder(_directory(output), _identity(recipe, prepared), resume=resume)


def kept_bytes(output: Path) -> int:
    """Bytes that lie in the work folder of an output: a prune uses them again, or removes them."""
    total = 0
    for file in _directory(output).glob("*"):
        with suppress(FileNotFoundError):  # another process may remove it now
            total += file.stat().st_size
    return total


def _directory(output: Path) -> Path:
    destination = output.resolve()
    return destination.with_name(f".{destination.name}.work")


def _identity(recipe: Recipe, prepared: Prepared) -> str:
    """Digest of what decides the result beside the calibration text, which ``begin`` adds.

    Weights are told by the size and time of their files.
    """
    digest = hashlib.sha256(installed_version().encode())
    digest.update(recipe.to_yaml().encode())
    digest.update((prepared.source.directory / CONFIG_NAME).read_bytes())
    for file in prepared.source.weight_files():
        state = file.stat()
        digest.update(f"{file.name} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()
