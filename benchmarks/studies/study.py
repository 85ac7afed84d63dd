"""What a study is: cells to measure, and a picture of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.subject import LEARNING, Sizes, Subject


@dataclass(frozen=True)
class Study:
    """One question. ``draw`` gets the rows and empty axes of matplotlib.

    ``key`` names the fields that tell one row from another; ``sizes`` and ``model`` are those of a
    run that says nothing else.
    """

    summary: str
    key: Sequence[str]
    measure: Callable[[Subject, Cells], None]
    draw: Callable[[Sequence[Row], Any], None]
    sizes: Sizes = LEARNING
    model: str = "smollm2"
