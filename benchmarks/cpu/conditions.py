"""What slows one side of a comparison more than the other, as the rows of a result say it."""

import os
from functools import cache
from typing import Any

from rich.console import Console

from benchmarks.cpu.fragmentation import share

FEWEST = 0.8
"""Of the rate of huge pages: slower, memory is called fragmented."""


@cache
def small_pages_at_start() -> float:
    """`fragmentation.share`, when this process first asked: before weights were allocated."""
    return round(share(), 2)


def conditions() -> dict[str, Any]:
    """What a row says of the machine.

    ``load_average`` is of the five minutes before: other work slows both sides. ``small_pages`` is
    `small_pages_at_start`: less than 1 slows peers, whose weights are in small pages, more than
    ours.
    """
    return {"load_average": round(os.getloadavg()[1], 1), "small_pages": small_pages_at_start()}


def warn(console: Console | None = None) -> None:
    """Say on the error stream that memory is fragmented, if it is, and what helps."""
    found = small_pages_at_start()
    if found < FEWEST:
        (console or Console(stderr=True)).print(
            f"[yellow]memory is fragmented: small pages are read at {found:.0%} of the rate of "
            "huge ones, which slows dense layers more than sparse ones, so ratios will flatter. "
            "`python -m benchmarks.cpu.fragmentation --hold`, running beside this, helps; so "
            "should a restart.",
            highlight=False,
        )
