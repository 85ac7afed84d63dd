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
"""Choices whose processor seconds are within this share of a budget cost as much."""

TRIES = 5
"""Runs of one choice at most, until one of them costs as much as the budget."""


def choices(layers: int) -> Mapping[str, str]:
    """Name of a choice -> its ``--learn-layers``."""
    number = max(1, layers // SHARE)
    found = {"all": "all", f"last:{number}": f"last:{number}", f"auto:{number}": f"auto:{number}"}
    for draw in range(DRAWS):
        chosen = random.Random(draw).sample(range(layers), number)
        found[f"random {number}, draw {draw + 1}"] = ",".join(map(str, sorted(chosen)))
    return found | {f"spread:{number}": f"spread:{number}"}


def measure(subject: Subject, cells: Cells) -> None:
    """Learn with each choice: with the same number of steps, then at the same cost.

    The cost is the processor seconds of spread layers; a row at it says so.
    """
    cells.row({"layers": "dense"}, subject.dense)
    start = cells.row({"layers": "none (CP)"}, lambda: subject.pruned(subject.recipe("wanda+cp")))
    usual, chosen = subject.sizes.steps, choices(subject.layers)
    reference = next(name for name in chosen if name.startswith("spread"))
    learned = partial(_learned, subject, chosen[reference], usual, None)
    budget = cells.row({"layers": reference}, learned)["seconds"]
    found = {
        name: cells.row({"layers": name}, partial(_learned, subject, layers, usual, budget))
        for name, layers in chosen.items()
    }
    for name, layers in chosen.items():
        runs = {usual: found[name]["seconds"]}
        while steps := next_steps(budget, start["seconds"], runs):
            learned = partial(_learned, subject, layers, steps, budget)
            runs[steps] = cells.row({"layers": name, "steps": steps}, learned)["seconds"]
    for size in WINDOWS:
        cells.row({"layers": f"all, {size} at a time"}, partial(_learned_in_windows, subject, size))


def near(budget: float, seconds: float) -> bool:
    """Whether a run costs as much as a budget."""
    return abs(seconds - budget) <= NEAR * budget


def next_steps(budget: float, start: float, runs: Mapping[int, float]) -> int | None:
    """Steps of one choice that may take a budget, by a straight line through what it took so far.

    What comes before learning differs from choice to choice, so the line is through two runs of the
    same one, where there are two: one on each side of the budget, or else the nearest two.

    Args:
        budget: seconds.
        start: seconds without learning, for a choice with one run alone.
        runs: steps -> seconds, of this choice.

    Returns:
        At most twice the steps of any run; None where a run costs as much as the budget, and where
        more tries would not help.
    """
    if len(runs) >= TRIES or any(near(budget, seconds) for seconds in runs.values()):
        return None
    points = runs.items() if len(runs) > 1 else [(0, start), *runs.items()]
    first, *others = sorted(points, key=lambda point: abs(point[1] - budget))
    across = [point for point in others if (point[1] > budget) != (first[1] > budget)]
    second = (across or others)[0]
    slope = (second[1] - first[1]) / (second[0] - first[0])
    if slope <= 0:
        return None
    steps = round(first[0] + (budget - first[1]) / slope)
    steps = min(max(1, steps), 2 * max(runs))
    return None if steps in runs else steps


def _learned(subject: Subject, layers: str, steps: int, budget: float | None) -> dict[str, Any]:
    """Without a budget the run is it itself."""
    learning = {"layers": layers, "steps": steps}
    found = subject.pruned(subject.recipe("permllm-wanda", learning=learning))
    same = budget is None or near(budget, found["seconds"])
    return {**found, **({"cost": "equal"} if same else {})}


def _learned_in_windows(subject: Subject, size: int) -> dict[str, Any]:
    """Without the losses, which are those of each window's own end."""
    learning = {"scope": "window", "window": size}
    found = subject.pruned(subject.recipe("permllm-wanda", learning=learning))
    return {name: found[name] for name in found if not name.startswith("loss")}


def draw(rows: Sequence[Row], axes: Any) -> None:
    """Perplexity of each choice, and which of them cost as much as each other."""
    pruned = [row for row in rows if row["layers"] != "dense"]
    labels = [
        row["layers"]
        + (f", {row['steps']} steps" if "steps" in row else "")
        + (" (equal cost)" if "cost" in row else "")
        for row in pruned
    ]
    perplexity_bars(axes, pruned, labels)


STUDY = Study("which decoder layers to learn", ("layers", "steps"), measure, draw)
