"""The table of a conversion: decoder layers with equal findings on one line."""

from __future__ import annotations

import re
from collections import defaultdict

from rich.table import Table
from rich.text import Text

from permllm_offline.conversion.report import ConversionReport
from permllm_offline.report.expert_lines import without_expert

_NUMBER = re.compile(r"\.(\d+)\.")


def conversion_table(report: ConversionReport) -> Table:
    """Show which linears were found in which order."""
    title = f"{report.source_format} -> {report.target_format}, {report.pattern}"
    table = Table(title=Text(title))
    table.add_column("linear")
    table.add_column("layers")
    table.add_column("permutation")
    table.add_column("density", justify="right")
    if report.rounding:
        table.add_column("rounding error", justify="right")
    table.add_column("why dense")
    rows = defaultdict(list)
    for linear in report.linears:
        number = _NUMBER.search(linear.name)
        name = _NUMBER.sub(".*.", without_expert(linear.name), count=1)
        key = (name, linear.permutation, linear.reason)
        rows[key].append((int(number[1]) if number else 0, linear))
    for (name, permutation, reason), found in rows.items():
        density = sum(linear.density for _, linear in found) / len(found)
        errors = [one.rounding_error for _, one in found if one.rounding_error is not None]
        error = [f"{max(errors):.2%}" if errors else ""] if report.rounding else []
        layers = _ranges([number for number, _ in found])
        table.add_row(Text(name), layers, permutation, f"{density:.3f}", *error, Text(reason))
    return table


def _ranges(numbers: list[int]) -> str:
    """Write 0, 1, 2, 5 as "0-2, 5"."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):  # that of a layer comes once for each expert
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
