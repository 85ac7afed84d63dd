"""A result of time to equal quality that a run may complete."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records.machine import require_comparable


def known_quality(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a file has of it, where that is comparable: as ``Rows`` has it for rows.

    Raises:
        ValueError: it is a result of another kind, or was measured with other settings, on another
            CPU, or with other versions.
    """
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not {"baseline", "machine", "versions"} <= set(found):
        raise ValueError(f"{path} is no result of --quality: give another file")
    older = {"steps": found["baseline"]["steps"], "quick": False}  # did not say so themselves
    require_comparable({**older, **found}, facts, f"{path}: its quality has")
    return found


def ratios(result: Mapping[str, Any]) -> dict[str, Any]:
    """Perplexities over those of the dense model, and over those of Wanda, by text.

    The former say how much is lost; the latter compare with results on other windows, where a mask
    that nothing learned loses more or less.

    Args:
        result: with its references, ``dense`` and ``wanda``.
    """
    references = result["references"]

    def over(perplexity: Mapping[str, float]) -> dict[str, dict[str, float]]:
        return {
            f"x {name}": {domain: value / reference[domain] for domain, value in perplexity.items()}
            for name, reference in references.items()
        }

    return {
        "wanda": over(references["wanda"]),
        "baseline": over(result["baseline"]["perplexity"]),
        "ours": [over(run["perplexity"]) for run in result["ours"]],
    }
