"""Tables of the documentation on serving."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.markdown import Result, markdown


def serving(result: Result, value: Callable[[Mapping[str, Any]], str], *, memory: bool) -> str:
    """A line per variant, a column per batch and prompt length.

    `memory` adds the most that the engine's processes had to themselves.
    """
    found = {(row["variant"], row["batch"], row["prompt_tokens"]): row for row in result["rows"]}
    cells = list(dict.fromkeys((batch, prompt) for _, batch, prompt in found))
    resident: dict[str, float] = {}
    for (variant, *_), row in found.items():
        if memory and "resident_mib" in row:
            resident[variant] = max(row["resident_mib"], resident.get(variant, 0.0))
    lines = []
    for variant in dict.fromkeys(variant for variant, _, _ in found):
        rows = [found.get((variant, *cell)) for cell in cells]
        line = [variant, *("" if row is None else value(row) for row in rows)]
        if resident:
            line.append(f"{resident[variant]:.0f}" if variant in resident else "")
        lines.append(line)
    header = ["variant", *(f"batch {batch}, prompt {prompt}" for batch, prompt in cells)]
    return markdown([*header, *(["resident MiB"] if resident else [])], lines)


def decode(result: Result) -> str:
    """Decoded tokens per second, and memory."""
    return serving(result, decode_speed, memory=True)


def first_token(result: Result) -> str:
    """How early the first token comes."""
    return serving(result, first_token_speed, memory=False)


def decode_speed(row: Mapping[str, Any]) -> str:
    """Decoded tokens per second, and how many times dense's that is."""
    return f"{row['decode_tokens_per_second']:.1f} ({row['decode_ratio']:.2f}x)"


def first_token_speed(row: Mapping[str, Any]) -> str:
    """How many times as early as dense's the first token comes."""
    return f"{row['first_token_ratio']:.2f}x"


def profile(result: Result) -> str:
    """Milliseconds of one decoded token by part."""
    total = sum(row["milliseconds"] for row in result["rows"])
    rows = [
        [row["part"], f"{row['milliseconds']:.1f}", f"{row['milliseconds'] / total:.0%}"]
        for row in result["rows"]
    ]
    return markdown(["part", "ms", "share"], [*rows, ["together", f"{total:.1f}", "100%"]])
