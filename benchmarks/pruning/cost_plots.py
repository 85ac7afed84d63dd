"""Plots of what learning and pruning cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.pruning.prune_parts import PARTS, REST, with_rest
from benchmarks.records.drawing import Row

Result = Mapping[str, Any]


def draw_steps(result: Result, axes: Any) -> None:
    """Seconds of a learning step of one layer by its width, a line for each loop."""
    labels = {"dense": "the paper's dense loop", "ours": "ours"}
    for loop, label in labels.items():
        steps = [step for step in result["steps"] if step["loop"] == loop]
        widths = [step["width"] for step in steps]
        axes.plot(widths, [step["seconds"] for step in steps], "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="channels", ylabel="seconds of a learning step")
    axes.set_xticks(widths, [str(width) for width in widths])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend()


def draw_quality(result: Result, axes: Any) -> None:
    """Perplexity on each text over seconds: ours with more and more steps, and the dense loop."""
    baseline, ours = result["baseline"], result["ours"]
    for number, domain in enumerate(baseline["perplexity"]):
        color = f"C{number}"
        runs = [run for run in ours if domain in run["perplexity"]]
        times = [run["seconds"] for run in runs]
        values = [run["perplexity"][domain] for run in runs]
        axes.plot(times, values, "o-", color=color, label=f"ours: {domain}")
        reached = baseline["perplexity"][domain]
        axes.axhline(reached, color=color, linewidth=0.8, linestyle=":")
        label = f"the paper's dense loop: {domain}"
        axes.plot(baseline["seconds"], reached, "s", color=color, label=label)
    axes.set(xlabel="seconds of calibration and learning", ylabel="perplexity")
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_pipeline(rows: Sequence[Row], axes: Any) -> None:
    """Processor minutes of a whole prune by method, stacked by part."""
    ends = [0.0] * len(rows)
    for part in (REST, *PARTS):
        minutes = [with_rest(row).get(part, 0.0) / 60 for row in rows]
        axes.barh(range(len(rows)), minutes, left=ends, label=part)
        ends = [end + more for end, more in zip(ends, minutes, strict=True)]
    axes.set_yticks(range(len(rows)), [row["method"] for row in rows])
    axes.tick_params(axis="y", labelsize="small")
    axes.invert_yaxis()
    axes.set_xlabel("processor minutes")
    axes.grid(axis="x", alpha=0.3)
    axes.figure.legend(loc="outside upper center", ncols=4, fontsize="small")
