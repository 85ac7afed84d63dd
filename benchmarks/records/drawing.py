"""Plots of results: SVG files that are the same for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Drawn = TypeVar("Drawn")


def save(
    draw: Callable[[Drawn, Any], None],
    drawn: Drawn,
    output: Path,
    *,
    panels: int = 1,
    size: tuple[float, float] = (7.0, 3.6),
    columns: int = 1,
) -> None:
    """Draw rows, or a whole result, into a file.

    ``draw`` gets them and empty axes: a flat array of them for several panels, which stand in
    ``columns``; ``size`` is that of a row of them, in inches.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    lines = -(-panels // columns)
    figure = Figure(figsize=(size[0], size[1] * lines), layout="constrained")
    axes = figure.subplots(lines, columns)
    draw(drawn, axes if panels == 1 else axes.ravel())
    output.parent.mkdir(parents=True, exist_ok=True)
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "permllm", "svg.fonttype": "none"}):
        figure.savefig(output, format="svg", metadata=no_metadata)


def grouped_columns(
    axes: Any, labels: Sequence[str], series: Mapping[str, Mapping[str, float]]
) -> None:
    """Draw a group of vertical bars for each label, a bar for each series that has a value there.

    A series keeps its place and its color where it has none.
    """
    width = 0.8 / max(1, len(series))
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * width
        places = [place + offset for place, label in enumerate(labels) if label in values]
        heights = [values[label] for label in labels if label in values]
        axes.bar(places, heights, width, label=name, color=f"C{number}")
    axes.set_xticks(range(len(labels)), labels, fontsize="small")
    axes.grid(axis="y", alpha=0.3)
