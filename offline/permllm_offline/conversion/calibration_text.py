"""The text that a conversion rounds with, and where what it said is kept until it is complete."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from permllm_offline.conversion.calibrated_rounding import CalibratedRounding, calibrate
from permllm_offline.conversion.sparse_model import SparseModel
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source, parse_device
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.pruning.streamed_windows import STATES_FORMAT
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report.report import CalibrationRecord
from permllm_offline.run.identity import identity_text, model_facts
from permllm_offline.run.local_path import work_directory
from permllm_offline.run.steps import Work, WorkFolder
from permllm_offline.sparsity.rounded_layer import Rounding
from permllm_offline.text.windows import SELF, check_datasets, sample_windows, writes_itself
from permllm_vllm.checkpoint.int4 import GROUP
from permllm_vllm.checkpoint.schema import installed_version
from permllm_vllm.checkpoint.shards import CONFIG_NAME

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CalibrationText:
    """Windows of the text of a recipe, int64 [windows, sequence_length], for a source.

    ``digest`` tells them from those of another text.
    """

    recipe: Recipe
    source: Source
    windows: Tensor
    digest: str

    @classmethod
    def read(cls, recipe: Recipe, source: Source) -> CalibrationText:
        """Draw the windows of a recipe's data sets.

        Raises:
            OfflineError: text or a tokenizer that cannot be used, or a device.
        """
        parse_device(recipe.device)
        if not recipe.datasets:
            raise OfflineError("the recipe of a conversion's text names no data set: give one.")
        if any(map(writes_itself, recipe.datasets)):
            raise OfflineError(
                f"--dataset {SELF}: a conversion reads text and has the model write none. Give a "
                "file, a folder or a hub name."
            )
        check_datasets(recipe.datasets, recipe.num_samples)
        drawn = sample_windows(
            recipe.datasets,
            load_tokenizer(source),
            num_samples=recipe.num_samples,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
            sampling=recipe.sampling,
            text_field=recipe.text_field,
        )
        digest = CalibrationRecord.of(drawn).tokens_sha256
        return cls(recipe, source, drawn.calibration, digest)

    def rounding(self, model: SparseModel, values: Rounding, work: Work) -> CalibratedRounding:
        """Choose the grids of a sparse model, which the source is; raises as ``calibrate``."""
        return calibrate(model, self.source, self.windows, values, self.recipe, work)


def check_groups(values: Rounding, block_size: int, *, permuted: bool) -> None:
    """Refuse int4 values whose groups a permutation takes apart.

    Raises:
        OfflineError: blocks of more channels than a group, and any that is ``permuted``.
    """
    if values == "int4" and permuted and block_size > GROUP:
        raise OfflineError(
            f"with calibration text, --values int4 rounds inputs in groups of {GROUP} of the order "
            f"that they come in, which permutations in blocks of {block_size} take apart: leave "
            "out --dataset, or give --values int8."
        )


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
