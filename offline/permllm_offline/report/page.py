"""The report of a prune as one HTML file that needs no other: tables and plots."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template

from permllm_offline.model.loading import Source
from permllm_offline.preparation.method_parts import parts_of, summary_of, title_of
from permllm_offline.report.expert_lines import joined_experts, without_expert
from permllm_offline.report.model_card import base_name, calibration_text, left_dense_text
from permllm_offline.report.plots import (
    curve_plot,
    error_plot,
    mask_plot,
    retained_plot,
    tuning_plot,
)
from permllm_offline.report.report import Report
from permllm_offline.run.costs import Cost

_TEMPLATE = Path(__file__).with_name("page.html.jinja")


@dataclass(frozen=True)
class Plot:
    """A picture, what it shows, and its SVG as base64."""

    title: str
    caption: str
    data: str


def report_page(report: Report, costs: Sequence[Cost], source: Source, output_name: str) -> str:
    """Write the page of a report.

    It shows names, no paths of this machine, and every number as ``report.json`` and
    ``costs.json`` have it, rounded.

    Args:
        report: of the prune.
        costs: of its steps.
        source: the dense base model.
        output_name: folder name of the checkpoint.
    """
    return _template().render(
        report=report,
        recipe=report.recipe,
        reconstruction=report.recipe.parsed_method().reconstruction,
        title=title_of(report.recipe),
        summary=summary_of(report.recipe),
        calibration=calibration_text(report).replace("`", ""),
        left_dense=left_dense_text(report).replace("`", ""),
        layers=joined_experts(report.layers),
        dense_names=dict.fromkeys(map(without_expert, report.left_dense)),
        base=base_name(source),
        name=output_name,
        plots=_plots(report),
        costs=costs,
    )


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    return environment.from_string(_TEMPLATE.read_text(encoding="utf-8"))


def _plots(report: Report) -> list[Plot]:
    plots = []
    if report.learning_curve:
        svg = curve_plot(report.learning_curve, "cosine distance")
        plots.append(_plot("Learning the permutations", _learning_caption(report), svg))
    if report.reconstruction_curve:
        svg = curve_plot(report.reconstruction_curve, "divergence, nats per token")
        caption = (
            "Divergence from the dense model's next-token distribution. The weights of the lowest "
            "validation loss are those of the checkpoint."
        )
        plots.append(_plot("Distilling the kept weights", caption, svg))
    if any(error.curve for error in report.reconstruction):
        caption = (
            "Squared error of the output of each decoder layer while it is tuned, on calibration "
            "windows held out from tuning. The weights of the lowest are those that stay."
        )
        svg = tuning_plot(report.reconstruction)
        plots.append(_plot("Tuning the kept weights of each decoder layer", caption, svg))
    if report.output_errors or report.reconstruction:
        caption = (
            "Squared difference from the dense model's output, relative to it. The input is that "
            "of the pruned layers before, so errors grow with depth."
        )
        plots.append(_plot("Error of each decoder layer", caption, error_plot(report)))
    chosen_masks = parts_of(report.recipe).reconstruction.chosen_masks
    what = "damage that removing each weight alone would do" if chosen_masks else "importance"
    caption = f"Share of the {what} that lies on the weights that the masks keep."
    plots.append(_plot("Retained importance", caption, retained_plot(report)))
    if (example := report.mask_example) is not None:
        rows, channels = len(example.pruned), len(example.pruned[0])
        caption = (
            f"{example.name}, its first {rows} output rows and {channels} input channels: what the "
            "importance alone would keep, and what is kept after the channels were permuted"
            + (", by masks chosen while weights are updated." if chosen_masks else ".")
        )
        plots.append(_plot("The mask, before and after", caption, mask_plot(example)))
    return plots


def _learning_caption(report: Report) -> str:
    if report.recipe.learning.scope == "model":
        return (
            "Distance of the last hidden state from the dense model's. The permutations of the "
            "lowest validation loss are those of the checkpoint."
        )
    return (
        "Distance of the hidden state after some decoder layers from the dense model's; dots are "
        "validation windows. The layers learn one after the other, each with the permutations of "
        "its own lowest validation loss, which are those of the checkpoint."
    )


def _plot(title: str, caption: str, svg: str) -> Plot:
    return Plot(title, caption, base64.b64encode(svg.encode()).decode())
