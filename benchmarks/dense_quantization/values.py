"""The values that are measured: what tells their rows apart, and what these are called."""

from collections.abc import Mapping
from typing import Any

KEY = ("values", "group", "method")
"""`group`: input channels that share a scale of int4; `method`: how values are chosen."""

Key = tuple[str, int | None, str | None]
"""Values of ``KEY``."""

DENSE: Key = ("bfloat16", None, None)
KEYS: tuple[Key, ...] = (
    DENSE,
    ("int8", None, "nearest"),
    ("int8", None, "gptq"),
    ("int4", 64, "nearest"),
    ("int4", 64, "gptq"),
    ("int4", 32, "gptq"),
)
"""Groups of 128, the usual ones, do not divide the hidden size of SmolLM2-135M, 576."""

METHODS = {"nearest": "to nearest", "gptq": "GPTQ"}


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is called: `dense int4, groups of 64, GPTQ`."""
    if row["method"] is None:
        return "dense bfloat16"
    inputs = " (W8A8)" if row["values"] == "int8" else f", groups of {row['group']}"
    return f"dense {row['values']}{inputs}, {METHODS[row['method']]}"
