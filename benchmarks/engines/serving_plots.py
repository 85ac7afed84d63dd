"""A serving result as a figure of small panels: speed, first token, loading, memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records.drawing import grouped_columns, save
from benchmarks.records.markdown import Result

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Panel:
    """What is drawn of the rows of a variant.

    Attributes:
        label: of the axis.
        field: of a row.
        ratio: the field with the ratio to dense and its label, which is drawn where any row has it.
        over_cells: what the rows say together, where it is one number for all cells.
    """

    label: str
    field: str
    ratio: tuple[str, str] | None = None
    over_cells: Callable[[Sequence[float]], float] | None = None


PANELS = (
    Panel(
        "decode tokens/s",
        "decode_tokens_per_second",
        ("decode_ratio", "decode tokens/s, times dense"),
    ),
    Panel(
        "first token, ms",
        "time_to_first_token_ms",
        ("first_token_ratio", "first token, times as early as dense's"),
    ),
    Panel("load, s", "load_seconds", over_cells=lambda starts: median(sorted(set(starts)))),
    Panel("resident memory, MiB", "resident_mib", over_cells=max),
)


def save_figure(result: Result, output: Path, title: str) -> None:
    """Draw a result of `benchmarks.serving` into an SVG file."""
    draw = partial(_draw_all, title=title)
    save(draw, result, output, panels=len(PANELS), columns=2, size=(9.0, 2.9))


def _draw_all(result: Result, axes: Sequence[Any], title: str) -> None:
    """Draw each of `PANELS` into axes of its own; variants that were refused have no bars."""
    rows = [row for row in result["rows"] if "refused" not in row]
    for panel, place in zip(PANELS, axes, strict=True):
        _draw(panel, rows, place)
    figure = axes[0].figure
    figure.suptitle(title, fontsize="medium")
    if rows:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=5, fontsize="small")


def _draw(panel: Panel, rows: Sequence[Row], axes: Any) -> None:
    field, label = panel.field, panel.label
    if panel.ratio is not None and any(panel.ratio[0] in row for row in rows):
        field, label = panel.ratio
        axes.axhline(1, color="black", linewidth=0.8)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    values: dict[str, dict[str, float]] = {variant: {} for variant in variants}
    for row in rows:
        if field in row:
            values[row["variant"]][_cell(row)] = row[field]
    groups = list(dict.fromkeys(map(_cell, rows)))
    if panel.over_cells is not None:
        groups = [""]
        values = {
            name: {"": panel.over_cells(list(found.values()))} if found else {}
            for name, found in values.items()
        }
    grouped_columns(axes, groups, values)
    axes.set_ylabel(label, fontsize="small")


def _cell(row: Row) -> str:
    return f"batch {row['batch']}\nprompt {row['prompt_tokens']}"
