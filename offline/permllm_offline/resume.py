"""Which work folder belongs to a prune, and whether what it holds may be used."""

from __future__ import annotations

import hashlib
import logging
from contextlib import suppress
from pathlib import Path

from permllm_offline.layerwise import PASSES, layer_step_name
from permllm_offline.preparation import Prepared
from permllm_offline.recipe_schema import Recipe
from permllm_offline.run.identity import identity_text
from permllm_offline.run.steps import INTERVAL, WorkFolder
from permllm_vllm.checkpoint.schema import installed_version
from permllm_vllm.checkpoint.shards import CONFIG_NAME

logger = logging.getLogger(__name__)


def work_folder(
    recipe: Recipe, prepared: Prepared, output: Path, *, resume: bool = False, restart: bool = False
) -> WorkFolder:
    """Open the work folder of an output: ``.NAME.work`` beside it.

    Raises:
        OfflineError: it holds steps of another recipe, model, data set or version, which
            ``restart`` would remove.
    """
    identity = _identity(recipe, prepared)
    return WorkFolder(_directory(output), identity, resume=resume, restart=restart)


def begin(work: WorkFolder, text: str, layers: int) -> None:
    """Begin work in its folder, and say after what it goes on, where steps are there.

    Args:
        work: the folder.
        text: what the calibration text adds to the identity.
        layers: of the decoder.
    """
    work.begin(text)
    kept = work.kept()
    if kept:
        logger.warning(
            "%s is left from a run that was cut off: goes on after %s; --restart begins anew",
            work.directory,
            _reached(kept, layers),
        )


def _reached(kept: list[str], layers: int) -> str:
    """The decoder layer, or the step, after which a run was cut off."""
    last = kept[0].removesuffix(INTERVAL)
    done = sum(layer_step_name(index) in kept for index in range(layers))
    if done and (last == PASSES or last == layer_step_name(done - 1)):
        return f"layer {done} of {layers}"
    return f"{'a part of ' if kept[0].endswith(INTERVAL) else ''}its step {last!r}"


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
    """What decides the result beside the calibration text, which ``begin`` adds.

    Weights are told by the size and time of their files.
    """
    config = (prepared.source.directory / CONFIG_NAME).read_bytes()
    files = {file.name: file.stat() for file in prepared.source.weight_files()}
    return identity_text(
        {
            "version": installed_version(),
            **recipe.choices(),
            CONFIG_NAME: hashlib.sha256(config).hexdigest()[:16],
            **{name: (one.st_size, one.st_mtime_ns) for name, one in files.items()},
        }
    )
