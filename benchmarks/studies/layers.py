"""Which layers to learn: the most sensitive, the last, random or spread ones, all, or none."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import Subject

SHARE = 5
"""One in so many layers learns: six of thirty, as in the paper's partial PermLLM of 7B models."""

DRAWS = 2


def choices(layers: int) -> Mapping[str, str]:
    """Name of a choice -> its ``--learn-layers``."""
    number = max(1, layers // SHARE)
    found = {"all": "all", f"last:{number}": f"last:{number}", f"auto:{number}": f"auto:{number}"}
    for draw in range(DRAWS):
        chosen = random.Random(draw).sample(range(layers), number)
        found[f"random {number}, draw {draw + 1}"] = ",".join(map(str, sorted(chosen)))
    return found | {f"spread:{number}": f"spread:{number}"}


def measure(subject: Subject, cells: Cells) -> None:
    """Learn with each choice; every one takes the same number of steps."""
    cells.row({"layers": "dense"}, subject.dense)
    cells.row({"layers": "none (CP)"}, lambda: subject.pruned(subject.recipe("wanda+cp")))
    for name, chosen in choices(subject.layers).items():
        cells.row({"layers": name}, partial(_learned, subject, chosen))


def _learned(subject: Subject, chosen: str) -> dict[str, Any]:
    return subject.pruned(subject.recipe("permllm-wanda", learning={"layers": chosen}))


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each choice."""
    pruned = [row for row in rows if row["layers"] != "dense"]
    perplexity_bars(axes, pruned, [row["layers"] for row in pruned])


STUDY = Study("which decoder layers to learn", ("layers",), measure, draw)
