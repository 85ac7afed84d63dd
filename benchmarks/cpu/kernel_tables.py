"""Tables of the documentation on the kernels."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.records.markdown import Result, Rows, markdown
from benchmarks.shapes import TOKENS

Row = Mapping[str, Any]
ByShape = Mapping[tuple[Any, ...], Row]
"""Rows by (outputs, inputs, pattern), value dtype and number of tokens."""
INTEGERS = ("int8", "int4")
"""Values that vLLM's dense int8 is compared with, too."""
AVX512_AIMS = {"bfloat16": (4.0, 1.7, 1.15, 1.05, 1.02), "int8": (6.0, 2.6, 2.3, 2.1, 2.05)}
AIMS = {
    "avx512_bf16": AVX512_AIMS,
    "zen5": AVX512_AIMS,
    "amx": {"bfloat16": (2.6, 2.6, 2.5, 2.5, 2.4), "int8": (4.5, 4.2, 4.0, 3.5, 3.0)},
}
"""Project targets: times as fast as dense bfloat16, one thread, at `TOKENS`, by instruction set."""


def fastest_peer(rows: Rows, peer_values: str, time: str = "peer_us") -> ByShape:
    """The row of the fastest peer, among those that have such a time."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["n"], row["k"], row["pattern"]), row["value_dtype"], row["m"]
        if row["peer_values"] != peer_values or row[time] is None:
            continue
        if key not in found or row[time] < found[key][time]:
            found[key] = row
    return found


@dataclass(frozen=True)
class Quantity:
    """What a line of a table shows of the rows of one value dtype, after the cells of its label."""

    rows: ByShape
    values: str
    label: Sequence[str]
    shown: Callable[[Row], float]
    missed: Callable[[Row], float | None] = lambda row: None
    """The aim that a row misses, which stands beside what is shown."""


def by_tokens(header: Sequence[str], quantities: Sequence[Quantity]) -> str:
    """A line per shape and quantity, a column per number of tokens."""
    keys = list(dict.fromkeys(key for quantity in quantities for key in quantity.rows))
    tokens = sorted({m for _, _, m in keys})
    several = len({pattern for (_, _, pattern), _, _ in keys}) > 1
    lines = []
    for n, k, pattern in dict.fromkeys(shape for shape, _, _ in keys):
        first = f"{n} x {k}, {pattern}" if several else f"{n} x {k}"
        for quantity in quantities:
            rows = [quantity.rows.get(((n, k, pattern), quantity.values, m)) for m in tokens]
            if any(rows):
                lines.append([first, *quantity.label, *(_cell(quantity, row) for row in rows)])
    return markdown(["N x K", *header, *(f"M = {m}" for m in tokens)], lines)


def _cell(quantity: Quantity, row: Row | None) -> str:
    if row is None:
        return ""
    aim = quantity.missed(row)
    return f"{quantity.shown(row):.2f}" + ("" if aim is None else f" ({aim:g})")


def aim_of(row: Row) -> float | None:
    """The aim of a row with a dense bfloat16 peer; None where there is none."""
    aims = AIMS.get(row["isa"], {}).get(row["value_dtype"])
    if aims is None or row["threads"] != 1 or row["m"] not in TOKENS:
        return None
    return aims[TOKENS.index(row["m"])]


def missed_aim(row: Row) -> float | None:
    """The same, if the row misses it."""
    aim = aim_of(row)
    return aim if aim is not None and row["ratio"] < aim else None


def ratios(result: Result) -> str:
    """Time of the fastest dense peer, of the dtype of the activations, over sparse time."""
    return by_tokens(["values"], _ratios(result["rows"], result.get("dtype", "bfloat16")))


def ratios_and_aims(result: Result) -> str:
    """The same, also to vLLM's dense int8, with the aims that are missed and their number."""
    rows = result["rows"]
    dense, int8 = (fastest_peer(rows, values) for values in ("bfloat16", "int8"))
    lines = [replace(quantity, missed=missed_aim) for quantity in _ratios(rows)]
    for values in INTEGERS:
        label = f"{values}, to vLLM's dense int8"
        lines.append(Quantity(int8, values, [label], lambda row: row["ratio"]))
    table = by_tokens(["values"], lines)
    aimed = [row for row in dense.values() if aim_of(row) is not None]
    if not aimed:
        return table
    cells = f"{sum(missed_aim(row) is not None for row in aimed)} of {len(aimed)} cells"
    return f"{table}\n\nIn brackets: the project target, where a cell misses it ({cells})."


def _ratios(rows: Rows, dtype: str = "bfloat16") -> list[Quantity]:
    dense = fastest_peer(rows, dtype)
    every = ("bfloat16", *INTEGERS)
    return [Quantity(dense, values, [values], lambda row: row["ratio"]) for values in every]
