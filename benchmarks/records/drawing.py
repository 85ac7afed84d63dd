"""Plots of results: SVG files that are the same for the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

Row = Mapping[str, Any]
Drawn = TypeVar("Drawn")


def save(
    draw: Callable[[Drawn, Any], None], drawn: Drawn, output: Path, *, panels: int = 1
) -> None:
    """Draw rows, or a whole result, into a file.

    ``draw`` gets them and empty axes: an array of them, one below the other, for several panels.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6 * panels), layout="constrained")
    axes = figure.subplots(panels)
    draw(drawn, axes)
    output.parent.mkdir(parents=True, exist_ok=True)
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "permllm", "svg.fonttype": "none"}):
        figure.savefig(output, format="svg", metadata=no_metadata)


def bars(axes: Any, labels: Sequence[str], series: Mapping[str, Sequence[float]]) -> None:
    """Draw a group of horizontal bars for each label, a bar for each series, best read downwards.

    Args:
        axes: of matplotlib.
        labels: of the groups.
        series: name -> a value for each label.
    """
    height = 0.8 / len(series)
    for number, (name, values) in enumerate(series.items()):
        offset = (number - (len(series) - 1) / 2) * height
        axes.barh([place + offset for place in range(len(labels))], values, height, label=name)
    axes.set_yticks(range(len(labels)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.figure.legend(loc="outside upper center", ncols=len(series), fontsize="small")


def perplexity_bars(axes: Any, rows: Sequence[Row], labels: Sequence[str]) -> None:
    """Draw the perplexity of each row on each text."""
    domains = list(rows[0]["perplexity"])
    series = {domain: [row["perplexity"][domain] for row in rows] for domain in domains}
    bars(axes, labels, series)
    axes.set_xlabel("perplexity")
