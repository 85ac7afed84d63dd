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
