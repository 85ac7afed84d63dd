"""The values that are measured: what tells their rows apart, and what these are called."""

from collections.abc import Mapping
from typing import Any

KEY = ("values", "group")
"""`group`: input channels that share a scale of int4."""

Key = tuple[str, int | None]
"""Values of ``KEY``."""

DENSE: Key = ("bfloat16", None)
KEYS: tuple[Key, ...] = (DENSE, ("int8", None), ("int4", 64))
"""Groups of 128, the usual ones, do not divide the hidden size of SmolLM2-135M, 576."""


def name_of(row: Mapping[str, Any]) -> str:
    """What a row is called: `dense int4, groups of 64`."""
    group = f", groups of {row['group']}" if row["group"] else ""
    return f"dense {row['values']}{' (W8A8)' if row['values'] == 'int8' else group}"
