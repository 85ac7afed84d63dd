"""Which layers to learn: the most sensitive, the last, random or spread ones, all, or none.

All of them end to end, or a few at a time.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.records.drawing import perplexity_bars
from benchmarks.studies.cells import Cells, Row
from benchmarks.studies.study import Study
from benchmarks.studies.subject import Subject

SHARE = 5
"""One in so many layers learns: six of thirty, as in the paper's partial PermLLM of 7B models."""

DRAWS = 2

WINDOWS = (1, 2, 5)
"""Decoder layers that learn together, where not all do."""

NEAR = 0.1
"""Choices whose seconds differ by less than this share cost the same."""


def choices(layers: int) -> Mapping[str, str]:
    """Name of a choice -> its ``--learn-layers``."""
    number = max(1, layers // SHARE)
    found = {"all": "all", f"last:{number}": f"last:{number}", f"auto:{number}": f"auto:{number}"}
    for draw in range(DRAWS):
        chosen = random.Random(draw).sample(range(layers), number)
        found[f"random {number}, draw {draw + 1}"] = ",".join(map(str, sorted(chosen)))
    return found | {f"spread:{number}": f"spread:{number}"}


def measure(subject: Subject, cells: Cells) -> None:
    """Learn with each choice: with the same number of steps, then for the same seconds.

    These seconds are those of spread layers.
    """
    cells.row({"layers": "dense"}, subject.dense)
    start = cells.row({"layers": "none (CP)"}, lambda: subject.pruned(subject.recipe("wanda+cp")))
    usual = subject.sizes.steps
    found = {
        name: cells.row({"layers": name}, partial(_learned, subject, chosen, usual))["seconds"]
        for name, chosen in choices(subject.layers).items()
    }
    budget = next(seconds for name, seconds in found.items() if name.startswith("spread"))
    for name, chosen in choices(subject.layers).items():
        steps = steps_within(budget, found[name], start["seconds"], usual)
        if steps != usual:
            key = {"layers": name, "steps": steps}
            cells.row(key, partial(_learned, subject, chosen, steps))
    for layers in WINDOWS:
        cells.row(
            {"layers": f"all, {layers} at a time"}, partial(_learned_in_windows, subject, layers)
        )


def steps_within(budget: float, seconds: float, start: float, steps: int) -> int:
    """Steps that take a budget, where ``steps`` took ``seconds`` of which the start took some.

    The same number where that is near to the budget.
    """
    if abs(seconds - budget) <= NEAR * budget or seconds <= start:
        return steps
    return max(1, round(steps * (budget - start) / (seconds - start)))


def _learned(subject: Subject, chosen: str, steps: int) -> dict[str, Any]:
    learning = {"layers": chosen, "steps": steps}
    return subject.pruned(subject.recipe("permllm-wanda", learning=learning))


def _learned_in_windows(subject: Subject, layers: int) -> dict[str, Any]:
    """Without the losses, which are those of each window's own end."""
    learning = {"scope": "window", "window": layers}
    found = subject.pruned(subject.recipe("permllm-wanda", learning=learning))
    return {name: found[name] for name in found if not name.startswith("loss")}


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each choice."""
    pruned = [row for row in rows if row["layers"] != "dense"]
    labels = [
        row["layers"] + (f", {row['steps']} steps" if "steps" in row else "") for row in pruned
    ]
    perplexity_bars(axes, pruned, labels)


STUDY = Study("which decoder layers to learn", ("layers", "steps"), measure, draw)
