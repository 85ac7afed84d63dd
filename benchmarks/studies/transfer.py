"""The same methods, with the same constants, on another model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.records.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import MANY_CELLS, Subject
from permllm_offline.recipe.methods import BEST

METHODS = ("wanda", "wanda+cp", "permllm-wanda", BEST)

STEPS_OF_LEARNING = 3
"""Steps of distillation, of one window each, for each step of learning, of several windows."""


def measure(subject: Subject, cells: Cells) -> None:
    """Each method with the defaults, but few steps."""
    cells.row({"method": "dense"}, subject.dense)
    for method in METHODS:
        entries = {}
        if method == BEST:  # on the windows of the others, without text of its own
            steps = STEPS_OF_LEARNING * subject.sizes.steps
            entries = {"distillation": {"steps": steps, "self_windows": 0}}
        recipe = subject.recipe(method, **entries)
        cells.row({"method": method}, partial(subject.pruned, recipe))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each method."""
    pruned = [row for row in rows if row["method"] != "dense"]
    perplexity_bars(axes, pruned, [row["method"] for row in pruned])


STUDY = Study("the defaults on another model", ("method",), measure, draw, MANY_CELLS, "gemma3")
