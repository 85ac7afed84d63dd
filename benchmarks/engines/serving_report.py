"""A serving result on the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]


def number(field: str, digits: int = 2, scale: float = 1) -> Callable[[Row], str]:
    """What shows a field of a row, or nothing where the row lacks it."""
    return lambda row: f"{row[field] * scale:.{digits}f}" if row.get(field) is not None else ""


TURNS: Sequence[Column] = (
    ("variant", lambda row: row["variant"]),
    ("batch", number("batch", 0)),
    ("prompt", number("prompt_tokens", 0)),
    ("decode tokens/s", number("decode_tokens_per_second", 1)),
    ("x dense", number("decode_ratio")),
    ("by bytes", number("byte_ratio")),
    ("first token ms", number("time_to_first_token_ms", 0)),
    ("x dense", number("first_token_ratio")),
    ("load s", number("load_seconds", 0)),
    ("resident MiB", number("resident_mib", 0)),
    ("of dense", number("resident_ratio")),
    ("peak MiB", number("peak_mib", 0)),
    ("pruned linears", number("packed_ratio", 3)),
    ("threads", number("threads", 0)),
    ("load", number("load_average", 1)),
)


def show(rows: Sequence[Row], title: str) -> None:
    """Print the rows as a table, and why variants were refused."""
    console = Console(width=160)
    table = Table(title=title)
    for header, _ in TURNS:
        table.add_column(header, justify="left" if header == "variant" else "right")
    for row in rows:
        table.add_row(*(shown(row) for _, shown in TURNS))
    console.print(table)
    for variant, why in {
        row["variant"]: row["refused"] for row in rows if "refused" in row
    }.items():
        console.print(f"{variant} was refused: {why}", markup=False)
