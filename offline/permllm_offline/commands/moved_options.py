"""Options that ``prune`` had once: whoever gives one is told where it went."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from permllm_offline.recipe.schema import LearningRecipe

_LEARN = ("layers", "scope", "window")
"""Entries of ``learning`` whose options began with ``--learn``."""

_ENTRIES = {
    "--sampling": "sampling: document",
    "--block-size": "block_size: 64",
    "--evaluation-windows": "evaluation_windows: 8",
    "--smoothing": "smoothing: true",
    "--no-smoothing": "smoothing: false",
    "--preset": "preset: paper",
    **{
        f"--{'learn-' if name in _LEARN else ''}{name.replace('_', '-')}": (
            f"learning: {{{name}: {field.default}}}"
        )
        for name, field in LearningRecipe.model_fields.items()
    },
}
"""Option -> what to write into the recipe, with a value that is possible."""

_REMEDIES = {
    "--resume": "finished steps are gone on from unasked; leave it out",
    "--scratch": "nothing is kept in files in place of memory any more; where a method does not "
    "fit, give --method wanda+cp --reconstruction obs+blockwise, which holds one decoder layer",
} | {
    option: f"it is an entry of the recipe; write `{entry}`, with your value, into a YAML file, "
    "and give that with --recipe FILE"
    for option, entry in _ENTRIES.items()
}


class _Moved(argparse.Action):
    """Refuses an option, and says what takes its place."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is no option any more: {self.const}.")


def add_moved_options(parser: argparse.ArgumentParser) -> None:
    """Add the options, which the help does not show."""
    for option, remedy in _REMEDIES.items():
        parser.add_argument(
            option,
            action=_Moved,
            const=remedy,
            nargs="?",
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )
