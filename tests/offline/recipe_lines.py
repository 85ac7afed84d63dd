"""Command lines of ``prune`` whose recipe entries are written to a file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from permllm_offline.preparation.recipe_input import overridden

Words = str | Mapping[str, Any]


def with_recipe(file: Path, *words: Words) -> list[str]:
    """Options as they are, and ``--recipe`` with a file of all mappings among them, if any."""
    options = [word for word in words if isinstance(word, str)]
    entries: dict[str, Any] = {}
    for word in words:
        if not isinstance(word, str):
            entries = overridden(entries, word)
    if entries:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entries), encoding="utf-8")  # every JSON document is YAML
        options += ["--recipe", str(file)]
    return options
