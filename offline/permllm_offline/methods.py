"""The methods of ``--method``: each names an importance and a kind of permutation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from permllm_offline.errors import OfflineError


@dataclass(frozen=True)
class Method:
    """An entry of the table; the parts are keys of their own tables."""

    importance: str
    permutation: str
    summary: str


METHODS: Mapping[str, Method] = {
    "magnitude": Method("magnitude", "none", "keep the largest weights, no data needed"),
    "wanda": Method("wanda", "none", "keep the largest weight times norm of its input"),
    "wanda+cp": Method(
        "wanda", "cp", "wanda after the heuristic channel reallocation of RIA, inside each block"
    ),
    "permllm-wanda": Method("wanda", "learned", "wanda with the learned permutation of PermLLM"),
}


def parse_method(name: str) -> Method:
    """Return a method by name; raises OfflineError that lists the known ones."""
    if name not in METHODS:
        raise OfflineError(f"method {name!r} is not known: give one of {', '.join(METHODS)}.")
    return METHODS[name]
