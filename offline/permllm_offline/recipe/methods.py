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


_SCORES = {"wanda": "weight times norm of its input", "ria": "RIA's relative importance"}

_PERMUTED = {
    "cp": "channels dealt over the groups of each block by importance",
    "cp-lsa": "cp refined by linear sum assignment, within each block",
    "cp-global": "cp-lsa through the whole layer, as in the paper's CP: accuracy studies only, no "
    "checkpoint",
}

BEST = "permllm-best"

METHODS: Mapping[str, Method] = {
    "magnitude": Method("magnitude", "none", "none", "keep the largest weights, no data needed"),
    **{name: Method(name, "none", "none", f"keep by {text}") for name, text in _SCORES.items()},
    "sparsegpt": Method(
        "wanda", "none", "sparsegpt", "SparseGPT: choose masks and update weights column by column"
    ),
    **{
        f"{score}+{permutation}": Method(score, permutation, "none", f"{score} after {text}")
        for permutation, text in _PERMUTED.items()
        for score in _SCORES
    },
    **{
        f"permllm-{score}": Method(
            score, "learned", "none", f"{score} with the learned permutation of PermLLM, in blocks"
        )
        for score in _SCORES
    },
    BEST: Method(
        "wanda",
        "cp",
        "distillation",
        "wanda+cp, in blocks, then all kept weights distilled from the dense model (no learned "
        "permutation; the paper's method is --method permllm-wanda)",
    ),
}


def parse_method(name: object) -> Method:
    """Return a method by name; raises OfflineError that lists the known ones."""
    if not isinstance(name, str) or name not in METHODS:
        raise OfflineError(f"method {name!r} is not known: give one of {', '.join(METHODS)}.")
    return METHODS[name]
