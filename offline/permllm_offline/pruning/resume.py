"""Which work folder belongs to a prune, and whether what it holds may be used."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from permllm_offline.errors import OfflineError
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.pruning.layerwise import PASSES, layer_step_name
from permllm_offline.pruning.streamed_windows import STATES_FORMAT
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.identity import identity_text, model_facts
from permllm_offline.run.local_path import work_directory
from permllm_offline.run.processes import first
from permllm_offline.run.steps import (
    INTERVAL,
    WorkFolder,
    check_steps,
    is_at_work,
    kept_steps,
)
from permllm_vllm.checkpoint.schema import installed_version
from permllm_vllm.checkpoint.shards import CONFIG_NAME

logger = logging.getLogger(__name__)


def work_folder(
    recipe: Recipe, prepared: Prepared, output: Path, *, restart: bool = False
) -> WorkFolder:
    """Open the work folder of an output: ``.NAME.work`` beside it.

    Raises:
        OfflineError: it holds steps of another recipe, model, data set or version, which
            ``restart`` would remove.
    """
    identity = _identity(recipe, prepared)
    return WorkFolder(work_directory(output), identity, restart=restart)


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


def foretell(recipe: Recipe, prepared: Prepared, output: Path, text: str) -> None:
    """Say after what a prune would go on, where steps are there; nothing is written or locked.

    Args:
        recipe: of the prune.
        prepared: its model.
        output: folder to write.
        text: as of ``begin``; empty where it is not known.

    Raises:
        OfflineError: steps for which ``work_folder`` or ``begin`` would refuse the prune.
    """
    directory = work_directory(output)
    if is_at_work(directory):
        logger.warning(
            "another prune is at work in %s: until it ends, one to the same output is refused",
            directory,
        )
        return
    check_steps(directory, _identity(recipe, prepared), text)
    kept = kept_steps(directory)
    if kept:
        logger.warning(
            "%s is left from a run that was cut off: a prune goes on after %s and takes less than "
            "a whole one; --restart begins anew",
            directory,
            _reached(kept, len(prepared.plan.layers)),
        )


def _reached(kept: list[str], layers: int) -> str:
    """The decoder layer, or the step, after which a run was cut off."""
    last = kept[0].removesuffix(INTERVAL)
    done = sum(layer_step_name(index) in kept for index in range(layers))
    if done and (last == PASSES or last == layer_step_name(done - 1)):
        return f"layer {done} of {layers}"
    return f"{'a part of ' if kept[0].endswith(INTERVAL) else ''}its step {last!r}"


def kept_bytes(recipe: Recipe, prepared: Prepared, output: Path, *, restart: bool = False) -> int:
    """Bytes in the work folder of an output that a prune uses again, or removes.

    Those of steps for which it is refused are none.
    """
    directory = work_directory(output)
    if first() and not restart:  # other processes may look while the first one is at work
        try:
            check_steps(directory, _identity(recipe, prepared))
        except OfflineError:
            return 0
    total = 0
    for file in directory.glob("*"):
        with suppress(FileNotFoundError):  # another process may remove it now
            total += file.stat().st_size
    return total


def _identity(recipe: Recipe, prepared: Prepared) -> str:
    """What decides the result beside the calibration text, which ``begin`` adds."""
    source = prepared.source
    return identity_text(
        {
            "version": installed_version(),
            "states": STATES_FORMAT,
            **recipe.choices(),
            **model_facts(source.directory / CONFIG_NAME, source.weight_files()),
        }
    )
