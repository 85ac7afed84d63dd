"""Options of a prune that are of no use to its method."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.recipe.refusals import option_of
from permllm_offline.recipe.schema import Recipe
from permllm_offline.text.windows import writes_itself

logger = logging.getLogger(__name__)

OF_ROWS = ("sampling", "text_field")
OF_TEXT = ("num_samples", "sampling", "sequence_length", "evaluation_windows", "text_field")
"""Entries of a recipe that say how its text is read."""


def warn_of_no_use(made: Recipe, changes: Mapping[str, Any], effort: str | None) -> None:
    """Name what a user gives that does nothing for the method, in warnings.

    Args:
        made: the recipe.
        changes: entries that the user gives; None says nothing.
        effort: that the user gives, if any.
    """
    parts = parts_of(made)
    if changes.get("block_size") is not None and not parts.permutation.permutes:
        logger.warning("%s permutes no channels: block_size is of no use", made.method)
    if made.dataset is None and not parts.reads_text:
        given = [name for name in OF_TEXT if changes.get(name) is not None]
        if given:
            logger.warning(
                "%s reads no text without --dataset: %s is of no use", made.method, _names(given)
            )
    if changes.get("smoothing") is not None and (made.values == "auto" or not made.datasets):
        logger.warning(
            "inputs are smoothed before --values int8 or int4 are chosen, as --dataset shows them: "
            "without both, smoothing is of no use"
        )
    if made.datasets and all(map(writes_itself, made.datasets)):
        given = [name for name in OF_ROWS if changes.get(name) is not None]
        if given:
            logger.warning("the model writes its text itself: %s is of no use", _names(given))
    learning = changes.get("learning") or {}
    if learning and not parts.permutation.learns:
        names = ", ".join(f"learning.{name}" for name in learning)
        logger.warning("%s learns no permutation: %s is of no use", made.method, names)
    elif "window" in learning and made.learning.scope != "window":
        logger.warning(
            "%s learns end to end: learning.window is of no use without `learning.scope: window`",
            made.method,
        )
    distilled = [] if effort is None else [f"--effort {effort}"]
    distilled += [f"distillation.{name}" for name in changes.get("distillation") or ()]
    if distilled and not parts.reconstruction.distils:
        names = ", ".join(distilled)
        logger.warning("%s distils nothing: %s is of no use", made.method, names)
    tuned = [f"blockwise.{name}" for name in changes.get("blockwise") or ()]
    if tuned and not parts.reconstruction.tunes:
        names = ", ".join(tuned)
        logger.warning("%s tunes no layer by itself: %s is of no use", made.method, names)


def _names(entries: Sequence[str]) -> str:
    return ", ".join(option_of([entry]) or entry for entry in entries)
