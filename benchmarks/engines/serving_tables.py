"""Tables of the documentation on serving."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.records.markdown import Result, markdown

Row = Mapping[str, Any]
Shown = Callable[[Row], str]
Together = Callable[[Sequence[Row]], str]


def by_cell(result: Result, shown: Shown, columns: Mapping[str, Together]) -> str:
    """A line per variant, a column per batch and prompt length, and further ones.

    Args:
        result: of `benchmarks.serving`.
        shown: what stands in a cell.
        columns: what the rows of a variant say together; left out where none says anything.
    """
    rows = result["rows"]
    found = {(row["variant"], row["batch"], row["prompt_tokens"]): row for row in rows}
    cells = list(dict.fromkeys((batch, prompt) for _, batch, prompt in found))
    variants = list(dict.fromkeys(variant for variant, _, _ in found))
    lines = {}
    for variant in variants:
        places = [found.get((variant, *cell)) for cell in cells]
        lines[variant] = [variant, *("" if row is None else _cell(row, shown) for row in places)]
    header = ["variant", *(f"batch {batch}, prompt {prompt}" for batch, prompt in cells)]
    for name, column in columns.items():
        values = [column([row for row in rows if row["variant"] == variant]) for variant in lines]
        if any(values):
            header.append(name)
            for line, value in zip(lines.values(), values, strict=True):
                line.append(value)
    return markdown(header, lines.values())


def _refusals(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Variants that were refused, and why: each reason once."""
    refused = [(row["variant"], row["refused"]) for row in rows if "refused" in row]
    return list(dict.fromkeys(refused))


def _reasons(refusals: Iterable[tuple[str, str]]) -> str:
    """Paragraphs that follow a table."""
    quoted = [(variant, why.replace("`", "'")) for variant, why in refusals]
    return "".join(f"\n\n{variant} was refused: `{why}`" for variant, why in quoted)


def _cell(row: Row, shown: Shown) -> str:
    return "refused" if "refused" in row else shown(row)


def decode(result: Result) -> str:
    """Decoded tokens per second and times dense's; memory, bytes of the pruned layers, loading."""
    rows = result["rows"]
    columns: dict[str, Together] = {
        "by bytes": lambda rows: _largest(rows, "byte_ratio", "{:.2f}x"),
        "pruned linears": lambda rows: _largest(rows, "packed_ratio", "{:.3f}x"),
        "resident MiB": _resident,
        "peak MiB": lambda rows: _largest(rows, "peak_mib", "{:.0f}"),
        _load_column(rows): _loading,
    }
    return by_cell(result, decode_speed, columns) + _reasons(_refusals(rows))


def overview(result: Result) -> str:
    """The cells that a reader asks for first: decoding by batch, a long prompt, memory."""
    rows = result["rows"]
    found = {(row["variant"], row["batch"], row["prompt_tokens"]): row for row in rows}
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        line = [variant]
        for batch, prompt, _, shown in OVERVIEW:
            row = found.get((variant, batch, prompt))
            line.append("" if row is None else _cell(row, shown))
        lines.append([*line, _resident([row for row in rows if row["variant"] == variant])])
    return markdown(["variant", *(name for *_, name, _ in OVERVIEW), "resident MiB"], lines)


def decode_speed(row: Row) -> str:
    """Decoded tokens per second, and how many times dense's that is."""
    return f"{row['decode_tokens_per_second']:.1f}{_times(row, 'decode_ratio', ' ({})')}"


def first_token_time(row: Row) -> str:
    """Milliseconds until the first token of all sequences, and how many times as early as dense."""
    return f"{row['time_to_first_token_ms']:.0f} ms{_times(row, 'first_token_ratio', ' ({})')}"


OVERVIEW: tuple[tuple[int, int, str, Shown], ...] = (
    (1, 32, "1 sequence, tokens/s", decode_speed),
    (8, 32, "8 sequences", decode_speed),
    (32, 32, "32 sequences", decode_speed),
    (1, 512, "first token of a prompt of 512", first_token_time),
)
"""Batch, tokens of the prompt, name of a column, and what stands in its cells."""


def _times(row: Row, field: str, form: str = "{}") -> str:
    return form.format(f"{row[field]:.2f}x") if field in row else ""


def _largest(rows: Sequence[Row], field: str, form: str) -> str:
    values = [row[field] for row in rows if field in row]
    return form.format(max(values)) if values else ""


def _resident(rows: Sequence[Row]) -> str:
    """The most, and what that is of dense's in the same cell."""
    held = [row for row in rows if "resident_mib" in row]
    if not held:
        return ""
    most = max(held, key=lambda row: row["resident_mib"])
    return f"{most['resident_mib']:.0f}{_times(most, 'resident_ratio', ' ({})')}"


def _starts(rows: Iterable[Row]) -> list[float]:
    """Load times of a variant: all cells that one start of an engine served have its time."""
    return sorted({row["load_seconds"] for row in rows if "load_seconds" in row})


def _load_column(rows: Sequence[Row]) -> str:
    """Its name says how many starts the times stand on."""
    variants = {row["variant"] for row in rows}
    each = [len(_starts(row for row in rows if row["variant"] == name)) for name in variants]
    counts = sorted({count for count in each if count})
    if counts in ([], [1]):
        return "load, s (one start)"
    return f"load, s (median of {'-'.join(str(n) for n in dict.fromkeys((counts[0], counts[-1])))})"


def _loading(rows: Sequence[Row]) -> str:
    starts = _starts(rows)
    return f"{median(starts):.0f}" if starts else ""
