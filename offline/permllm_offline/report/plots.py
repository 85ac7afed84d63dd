"""Plots of a report, each an SVG that needs no other file."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from permllm_offline.reconstruction.layer_work import LayerError
from permllm_offline.report.expert_lines import joined_experts
from permllm_offline.report.mask_example import MaskExample
from permllm_offline.report.report import Report

_SIZE = (7.0, 3.2)
_PRUNED, _ONLY_UNPERMUTED, _ONLY_PRUNED, _BOTH = "#f4f4f4", "#d95f02", "#1b9e77", "#404040"


def curve_plot(curve: Sequence[Mapping[str, float]], quantity: str) -> str:
    """Draw the loss of each step and, where it was measured, that of validation windows.

    Each span of decoder layers in the curve has lines of its own.
    """
    figure, axes = _figure()
    spans: dict[str, list[Mapping[str, float]]] = {}
    for entry in curve:
        spans.setdefault(_span_label(entry), []).append(entry)
    for number, (name, entries) in enumerate(spans.items()):
        for key, label, style in (
            ("loss", "calibration windows", "-"),
            ("validation_loss", "validation windows", "o-"),
        ):
            points = [(entry["step"], entry[key]) for entry in entries if key in entry]
            if not points:
                continue
            if len(spans) == 1:
                axes.plot(*zip(*points, strict=True), style, label=label, markersize=4)
            else:
                shown = name if key == "validation_loss" else "_"  # a legend without it
                color = f"C{number % 10}"
                axes.plot(*zip(*points, strict=True), style, color=color, label=shown, markersize=3)
    axes.set(xlabel="step", ylabel=quantity)
    axes.legend(**({} if len(spans) == 1 else {"fontsize": "small", "ncols": 4}))
    return _svg(figure)


def _span_label(entry: Mapping[str, float]) -> str:
    first, last = entry.get("first_layer"), entry.get("last_layer")
    return f"layer {first}" if first == last else f"layers {first}-{last}"


def tuning_plot(errors: Sequence[LayerError]) -> str:
    """Draw the held-out error of each decoder layer while it is tuned, relative to its start."""
    figure, axes = _figure()
    for index, error in enumerate(errors):
        if not error.curve:  # nothing of the layer was pruned
            continue
        measured = [entry for entry in error.curve if "validation_loss" in entry]
        start = measured[0]["validation_loss"] or 1.0
        points = [(entry["step"], entry["validation_loss"] / start) for entry in measured]
        # Dark layers are the first ones.
        color = (0.1, 0.2 + 0.6 * index / len(errors), 0.5)
        axes.plot(*zip(*points, strict=True), "o-", color=color, label=f"{index}", markersize=3)
    axes.set(xlabel="step", ylabel="squared error, of that at the start")
    axes.legend(title="decoder layer", fontsize="xx-small", ncols=6)
    return _svg(figure)


def error_plot(report: Report) -> str:
    """Draw the relative squared error of each decoder layer's output."""
    figure, axes = _figure()
    if report.reconstruction:
        before = [error.before for error in report.reconstruction]
        after = [error.after for error in report.reconstruction]
        axes.plot(before, "o--", label="masks alone, calibration windows", markersize=4)
        axes.plot(after, "o-", label="reconstructed, calibration windows", markersize=4)
    if report.reallocated_errors:
        label = "reallocation, before learning, held-out windows"
        axes.plot(report.reallocated_errors, "v--", label=label, markersize=4)
    if report.masked_errors:
        label = "before distillation, held-out windows"
        axes.plot(report.masked_errors, "^-", label=label, markersize=4)
    if report.output_errors:
        axes.plot(report.output_errors, "s-", label="at the end, held-out windows", markersize=4)
    axes.set(xlabel="decoder layer", ylabel="relative squared error")
    axes.legend()
    return _svg(figure)


def retained_plot(report: Report) -> str:
    """Draw the share of the importance that the masks keep, a line for each linear."""
    figure, axes = _figure()
    lines: dict[str, list[tuple[int, float]]] = {}
    for layer in joined_experts(report.layers):
        number, name = _place(layer.name)
        lines.setdefault(name, []).append((number, layer.retained_importance))
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
    axes.set(xlabel="decoder layer", ylabel="share of importance kept")
    axes.legend(fontsize="small", ncols=4)
    return _svg(figure)


def _place(linear: str) -> tuple[int, str]:
    """Number of a linear's decoder layer, and its name in the attention or the MLP of that."""
    parts = linear.split(".")
    at = next(at for at, part in enumerate(parts) if part.isdecimal())
    inside = parts[at + 1 :]
    return int(parts[at]), ".".join(inside[1:] or inside)


def mask_plot(example: MaskExample) -> str:
    """Draw which weights a corner of one linear keeps, without and with the permutation."""
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    unpermuted, pruned = _bits(example.unpermuted), _bits(example.pruned)
    # 0: pruned in both; 1: kept in this one alone; 2: kept in both.
    panels = (
        ("without permutation", unpermuted, pruned, _ONLY_UNPERMUTED),
        ("with the permutation", pruned, unpermuted, _ONLY_PRUNED),
    )
    figure = Figure(figsize=(8.0, 4.4), layout="constrained")
    for axes, (title, mine, other, color) in zip(figure.subplots(1, 2), panels, strict=True):
        cells = [
            [here * (1 + there) for here, there in zip(*rows, strict=True)]
            for rows in zip(mine, other, strict=True)
        ]
        colors = ListedColormap([_PRUNED, color, _BOTH])
        axes.imshow(cells, cmap=colors, vmin=0, vmax=2, interpolation="nearest")
        axes.set(title=title, xlabel="input channel, original order", ylabel="output row")
    labels = (
        (_BOTH, "kept in both"),
        (_ONLY_UNPERMUTED, "only without"),
        (_ONLY_PRUNED, "only with"),
    )
    patches = [Patch(color=color, label=label) for color, label in labels]
    figure.legend(handles=patches, loc="outside lower center", ncols=3)
    return _svg(figure)


def _bits(rows: Iterable[str]) -> list[list[int]]:
    return [[int(bit) for bit in row] for row in rows]


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def _svg(figure: Any) -> str:
    """The figure as one SVG element; the same figure gives the same text."""
    from matplotlib import rc_context

    text, no_metadata = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.hashsalt": "permllm", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata=no_metadata)
    return text.getvalue()[text.getvalue().index("<svg") :]
