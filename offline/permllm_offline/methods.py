"""The methods of ``--method``: each names an importance, a permutation and a reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from permllm_offline.errors import OfflineError


@dataclass(frozen=True)
class Method:
    """An entry of the table; the parts are keys of their own tables."""

    importance: str
    permutation: str
    reconstruction: str
    summary: str


METHODS: Mapping[str, Method] = {
    "magnitude": Method("magnitude", "none", "none", "keep the largest weights, no data needed"),
    "wanda": Method("wanda", "none", "none", "keep the largest weight times norm of its input"),
    "wanda+cp": Method(
        "wanda",
        "cp",
        "none",
        "wanda after the heuristic channel reallocation of RIA, inside each block",
    ),
    "permllm-wanda": Method(
        "wanda", "learned", "none", "wanda with the learned permutation of PermLLM"
    ),
}


def parse_method(name: str) -> Method:
    """Return a method by name; raises OfflineError that lists the known ones."""
    if name not in METHODS:
        raise OfflineError(f"method {name!r} is not known: give one of {', '.join(METHODS)}.")
    return METHODS[name]
