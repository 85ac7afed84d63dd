"""The tables of the documentation on one layer: cell by cell, and by pattern."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from benchmarks.records.markdown import Result, Rows, markdown

Row = Mapping[str, Any]
ByShape = Mapping[tuple[Any, ...], Row]
"""Rows by (outputs, inputs, pattern), value dtype and number of tokens."""


def fastest_peer(rows: Rows, peer_values: str) -> ByShape:
    """The row of the fastest peer with such values."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = (row["n"], row["k"], row["pattern"]), row["value_dtype"], row["m"]
        if row["peer_values"] != peer_values:
            continue
        if key not in found or row["peer_us"] < found[key]["peer_us"]:
            found[key] = row
    return found


def ratios(result: Result) -> str:
    """Times as fast as the fastest dense peer, of the dtype of the activations, and as dense int8.

    A line per shape, values and kind of peer, a column per number of tokens.
    """
    rows = result["rows"]
    tokens = sorted({row["m"] for row in rows})
    shapes = list(dict.fromkeys((row["n"], row["k"], row["pattern"]) for row in rows))
    several = len({pattern for _, _, pattern in shapes}) > 1
    dtype = result.get("dtype", "bfloat16")
    peers = ((dtype, ""), ("int8", ", to vLLM's dense int8"))
    lines = []
    for n, k, pattern in shapes:
        for values in dict.fromkeys(row["value_dtype"] for row in rows):
            for peer, label in peers:
                found = fastest_peer(rows, peer)
                own = [found.get(((n, k, pattern), values, m)) for m in tokens]
                if any(own):
                    shape = f"{n} x {k}, {pattern}" if several else f"{n} x {k}"
                    cells = ["" if row is None else f"{row['ratio']:.2f}" for row in own]
                    lines.append([shape, f"{values}{label}", *cells])
    return markdown(["N x K", "values", *(f"M = {m}" for m in tokens)], lines)


def patterns(result: Result) -> str:
    """Times as long as 2:4 in the same run: the median of the shapes, and the least and most."""
    times = {
        (row["n"], row["k"], row["pattern"], row["value_dtype"], row["m"]): row["ours_us"]
        for row in result["rows"]
    }
    tokens = sorted({key[-1] for key in times})
    shapes = list(dict.fromkeys(key[:2] for key in times))
    lines = []
    for pattern in dict.fromkeys(key[2] for key in times if key[2] != "2:4"):
        for values in dict.fromkeys(key[3] for key in times):
            found = [
                [
                    times[*shape, pattern, values, m] / times[*shape, "2:4", values, m]
                    for m in tokens
                ]
                for shape in shapes
            ]
            cells = [
                f"{median(column):.2f} ({min(column):.2f} to {max(column):.2f})"
                for column in zip(*found, strict=True)
            ]
            lines.append([pattern, values, *cells])
    return markdown(["pattern", "values", *(f"M = {m}" for m in tokens)], lines)
