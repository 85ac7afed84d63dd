"""The same methods, with the same constants, on another model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from benchmarks.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import MANY_CELLS, Subject

METHODS = ("wanda", "wanda+cp", "permllm-wanda")


def measure(subject: Subject, cells: Cells) -> None:
    """Each method with the defaults."""
    cells.row({"method": "dense"}, subject.dense)
    for method in METHODS:
        cells.row({"method": method}, partial(subject.pruned, subject.recipe(method)))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each method."""
    pruned = [row for row in rows if row["method"] != "dense"]
    perplexity_bars(axes, pruned, [row["method"] for row in pruned])


STUDY = Study("the defaults on another model", ("method",), measure, draw, MANY_CELLS, "gemma3")
