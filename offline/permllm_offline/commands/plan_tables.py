"""The tables of ``permllm-offline plan``."""

from __future__ import annotations

import re
from collections import defaultdict

from rich.table import Table
from rich.text import Text

from permllm_offline.forecast.outline import Outline, OutlinedLinear


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


def _without_numbers(name: str) -> str:
    return re.sub(r"\.[0-9]+\.", ".*.", name)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.2f}"
