"""Experts of a decoder layer as one line of a table."""

from __future__ import annotations


def without_expert(name: str) -> str:
    """Write * for the number of an expert: ``model.layers.0.mlp.experts.*.up_proj``."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    for at in numbers[1:]:
        parts[at] = "*"
    return ".".join(parts)


def with_count(name: str, count: int) -> str:
    """Name of a line that stands for some linears, with their number where it is more than one."""
    return name if count == 1 else f"{name} ({count})"
