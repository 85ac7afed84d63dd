"""The parts of a prune that ``costs.json`` times, summed up."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

REFERENCE = "ria+cp"
"""The method that whole prunes are held against."""

REST = "start, reading, writing"
PARTS: Mapping[str, Sequence[str]] = {
    "calibration": ("passes", "statistics"),
    "masks and updates": ("masks", "layer"),
    "learning": ("sensitivities", "learned"),
    "text of its own": ("own-text",),
    "distillation": ("distillation",),
    "evaluation": ("dense-outputs", "dense-perplexity", "output-errors", "sparse-perplexity"),
}
"""Part of a prune -> the steps of ``costs.json`` in it, without the numbers of decoder layers."""

CURVES = {"learning": "learning_curve", "distillation": "reconstruction_curve"}
"""Part -> its entry in ``report.json``, one for each step and one for the start."""


def parts(
    steps: Sequence[Mapping[str, Any]], report: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
    """Sum the steps of ``costs.json`` up: part -> seconds, processor seconds, peak bytes.

    Where a part is a loop of steps over windows, ``steps`` counts them.

    Raises:
        KeyError: a step that belongs to no part.
    """
    part_of = {step: part for part, names in PARTS.items() for step in names}
    found: dict[str, dict[str, Any]] = {}
    for step in steps:
        part = part_of[re.sub(r"-\d+$", "", step["name"])]
        sums = found.setdefault(part, {"seconds": 0.0, "processor_seconds": 0.0, "peak_bytes": 0})
        for key in ("seconds", "processor_seconds"):
            sums[key] = round(sums[key] + step[key], 2)
        sums["peak_bytes"] = max(sums["peak_bytes"], step["peak_bytes"] or 0)
    for part, curve in CURVES.items():
        if part in found:
            found[part]["steps"] = len(report[curve]) - 1
    return {part: found[part] for part in PARTS if part in found}


def with_rest(row: Mapping[str, Any], key: str = "processor_seconds") -> dict[str, float]:
    """Part -> its seconds in a row, with what no step counts in front."""
    named = {part: sums[key] for part, sums in row["parts"].items()}
    return {REST: row[key] - sum(named.values()), **named}
