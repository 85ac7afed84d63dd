"""Tables that the sub-commands print."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from permllm_offline.forecast.announcement import duration, expected_lines
from permllm_offline.forecast.duration import Forecast
from permllm_offline.inspection.contents import InspectedLayer, Inspection
from permllm_offline.model.prune_plan import PlannedLinear
from permllm_offline.preparation.method_parts import title_of
from permllm_offline.preparation.prepared import Prepared
from permllm_offline.recipe.schema import Recipe
from permllm_offline.report.expert_lines import with_count, without_expert
from permllm_offline.report.report import Report

MINIMUM_WIDTH = 140
"""Columns below which a table would cut its words; a narrower terminal wraps lines instead."""


def show(*parts: RenderableType) -> None:
    """Print tables to standard output, whole whatever the width of the terminal."""
    width = Console().width
    Console(width=max(width, MINIMUM_WIDTH)).print(*parts)


def plan_table(recipe: Recipe, prepared: Prepared, expected: Forecast) -> Group:
    """Show what a prune would do."""
    table = Table(title=f"{title_of(recipe)}, {recipe.pattern}: nothing written (--dry-run)")
    table.add_column("layer")
    for column in ("shape", "permutation", "dense bytes", "sparse bytes"):
        table.add_column(column, justify="right")
    for column in ("decoder\nlayer takes", "and\nholds"):
        table.add_column(column, justify="right")
    layers = zip(
        prepared.plan.all_by_layer, expected.layer_seconds, expected.memory.layers, strict=True
    )
    for linears, seconds, layer_bytes in layers:
        both = duration(seconds), f"{layer_bytes / 1e6:,.1f} MB"
        rows: dict[tuple[str, str, str], list[PlannedLinear]] = defaultdict(list)
        for linear in linears:
            shape = f"{linear.out_features} x {linear.layout.in_features}"
            rows[without_expert(linear.name), shape, _state(linear)].append(linear)
        for (name, shape, state), alike in rows.items():
            table.add_row(
                Text(with_count(name, len(alike))),
                shape,
                state,
                f"{sum(linear.dense_bytes for linear in alike):,}",
                f"{sum(linear.sparse_bytes for linear in alike):,}",
                *(both if alike[0] is linears[0] else ()),
            )
        table.add_section()
    total = f"output: about {prepared.output_bytes / 1e6:,.1f} MB of tensors, dense ones included"
    return Group(table, total, *map(Text, expected_lines(recipe, prepared, expected)))


def _state(linear: PlannedLinear) -> str:
    if not linear.permuted:
        return "none" if linear.pruned else "left dense"
    return "folded" if linear.layout.folded else "run time"


def report_table(report: Report) -> Table:
    """Sum up a finished prune."""
    table = Table(title=f"{title_of(report.recipe)}, {report.recipe.pattern}", show_header=False)
    before, after = report.perplexity_before, report.perplexity_after
    table.add_row("pruned linear layers", str(len(report.layers)))
    if report.left_dense:
        table.add_row("linear layers left dense", str(len(report.left_dense)))
    table.add_row("their bytes, against dense", f"{report.byte_ratio:.1%}")
    errors = [layer.rounding_error for layer in report.layers if layer.rounding_error is not None]
    if errors:
        name = f"{report.recipe.values}: {report.rounding_measure}"
        table.add_row(name, f"{max(errors):.2%} at most")
    table.add_row("perplexity dense, held-out windows", "-" if before is None else f"{before:.2f}")
    table.add_row("perplexity sparse, held-out windows", "-" if after is None else f"{after:.2f}")
    return table


def inspection_table(found: Inspection) -> Table:
    """Show the layers of a checkpoint."""
    table = Table(title=f"pattern {found.pattern}, block size {found.block_size}", show_footer=True)
    if found.ignore:
        table.caption = Text(f"left dense: {', '.join(found.ignore)}")
    table.add_column("layer", footer="total")
    table.add_column("shape", justify="right")
    table.add_column("pattern", justify="right")
    table.add_column("permutation", justify="right")
    table.add_column("values", justify="right")
    table.add_column("bytes", justify="right", footer=f"{found.bytes:,}")
    table.add_column("of dense", justify="right", footer=f"{found.bytes / found.dense_bytes:.1%}")
    table.add_column("density", justify="right")
    rows: dict[tuple[str, ...], list[InspectedLayer]] = defaultdict(list)
    for layer in found.layers:
        shape = f"{layer.out_features} x {layer.in_features}"
        kind = layer.pattern, layer.permutation, layer.value_dtype
        rows[without_expert(layer.name), shape, *kind].append(layer)
    for (name, *cells), layers in rows.items():
        size = sum(layer.bytes for layer in layers)
        table.add_row(
            Text(with_count(name, len(layers))),
            *cells,
            f"{size:,}",
            f"{size / sum(layer.dense_bytes for layer in layers):.1%}",
            f"{sum(layer.density for layer in layers) / len(layers):.3f}",
        )
    return table
