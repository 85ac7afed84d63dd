"""The tables of ``permllm-offline plan``."""

from __future__ import annotations

import re
from collections import defaultdict

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from permllm_offline.forecast.outline import Outline, OutlinedLinear
from permllm_offline.forecast.speedup import Speed

EXTRAPOLATED = "~ extrapolated: no such size, or no such number of tokens, was measured"
OUTSIDE = "without layers left dense, attention and the output head: a served model gains less"


def outline_table(found: Outline) -> Table:
    """Show what is pruned and what stays dense, equal linears of all layers in one row."""
    title = f"{found.model}: pattern {found.pattern}, values {found.value_dtype}"
    table = Table(title=Text(title), show_footer=True)
    share = found.bytes_after / found.bytes_before
    table.add_column("tensors", footer="total")
    table.add_column("count", justify="right")
    table.add_column("shape", justify="right")
    table.add_column("permutation", justify="right")
    table.add_column("MB before", justify="right", footer=_megabytes(found.bytes_before))
    table.add_column("MB after", justify="right", footer=_megabytes(found.bytes_after))
    table.add_column("share", justify="right", footer=f"{share:.1%}")
    rows: dict[tuple[str, str, str], list[OutlinedLinear]] = defaultdict(list)
    for linear in found.linears:
        shape = f"{linear.out_features} x {linear.in_features}"
        rows[_without_numbers(linear.name), shape, linear.permutation].append(linear)
    for (name, shape, permutation), linears in rows.items():
        before = sum(linear.bytes_before for linear in linears)
        after = sum(linear.bytes_after for linear in linears)
        table.add_row(
            *(Text(name), str(len(linears)), shape, permutation),
            *(_megabytes(before), _megabytes(after), f"{after / before:.1%}"),
        )
    kept: dict[tuple[str, str], list[tuple[int, int]]] = defaultdict(list)
    chosen = set(found.left_dense)
    for name, size in found.dense.items():
        by_choice = name.endswith(".weight") and name.removesuffix(".weight") in chosen
        state = "left dense, --ignore" if by_choice else "left dense"
        beside = next((one for one in found.beside if name.startswith(f"{one}.")), None)
        row = _without_numbers(name) if beside is None else f"{beside}.*"
        kept[row, state].append((size, found.dense_after[name]))
    for (name, state), sizes in kept.items():
        before, after = map(sum, zip(*sizes, strict=True))
        table.add_row(
            *(Text(name), str(len(sizes)), "", state),
            *(_megabytes(before), _megabytes(after), f"{after / max(before, 1):.1%}"),
        )
    return table


def speed_table(speed: Speed, pattern: str) -> RenderableType:
    """Show how much faster each matrix may become, or why nobody knows.

    The title says where another pattern than the model's was measured.
    """
    if not speed.shapes:
        return Text(f"speed: {speed.reason}")
    of = pattern if speed.pattern == pattern else f"{speed.pattern} ({pattern} was not measured)"
    title = f"expected speed of {of}, x the faster dense bfloat16, one thread, from {speed.source}"
    inside = speed.whole_inside()
    notes = [OUTSIDE] if all(inside.values()) else [EXTRAPOLATED, OUTSIDE]
    if speed.note:
        notes.insert(0, speed.note)
    table = Table(title=Text(title), show_footer=True, caption="\n".join(notes))
    table.add_column("linears", footer="all pruned linears")
    table.add_column("N x K", justify="right")
    table.add_column("count", justify="right")
    for m, ratio in speed.whole().items():
        table.add_column(f"M = {m}", justify="right", footer=_times(ratio, inside[m]))
    for one in speed.shapes:
        ratios = [_times(found.ratio, found.inside) for found in one.forecasts.values()]
        shape = one.shape
        table.add_row(Text(shape.linears), f"{shape.n} x {shape.k}", str(shape.count), *ratios)
    return table


def _times(ratio: float, inside: bool) -> str:
    return f"{'' if inside else '~'}{ratio:.2f}"


def _without_numbers(name: str) -> str:
    return re.sub(r"\.[0-9]+\.", ".*.", name)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}"
