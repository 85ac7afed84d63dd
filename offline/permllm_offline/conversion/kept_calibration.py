"""Where the calibration of a conversion is kept until its output is complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from permllm_offline.conversion.calibrated_rounding import CalibrationText
from permllm_offline.errors import OfflineError
from permllm_offline.pruning.streamed_windows import STATES_FORMAT
from permllm_offline.run.identity import identity_text, model_facts
from permllm_offline.run.local_path import work_directory
from permllm_offline.run.steps import Work, WorkFolder
from permllm_vllm.checkpoint.schema import installed_version
from permllm_vllm.checkpoint.shards import CONFIG_NAME

logger = logging.getLogger(__name__)


@contextmanager
def kept_calibration(
    text: CalibrationText | None,
    output: Path,
    choices: Mapping[str, Any],
    files: Sequence[Path] = (),
    *,
    restart: bool = False,
) -> Iterator[Work]:
    """Keep what the text says of each decoder layer in ``.NAME.work`` beside the output.

    A conversion that is cut off leaves it, and the same one goes on from there; one that is
    complete removes it. Without text nothing is kept.

    Args:
        text: that layers are calibrated with.
        output: folder to write.
        choices: what decides the result beside the text and its recipe.
        files: that do so beside those of the source.
        restart: whether what is there is removed first.

    Raises:
        OfflineError: the folder holds steps of another source, recipe, text or version, or another
            run works there.
    """
    if text is None:
        yield Work()
        return
    source = text.source
    identity = identity_text(
        {
            "version": installed_version(),
            "states": STATES_FORMAT,
            **text.recipe.choices(),
            **choices,
            **model_facts(source.directory / CONFIG_NAME, [*source.weight_files(), *files]),
        }
    )
    with WorkFolder(work_directory(output), identity, restart=restart) as work:
        work.begin(text.digest)
        if work.kept():
            logger.warning(
                "%s is left from a run that was cut off: goes on after the last decoder layer "
                "there; --restart begins anew",
                work.directory,
            )
        yield work
        try:
            work.remove()
        except OfflineError as error:
            logger.warning("%s", error)  # the checkpoint is complete
