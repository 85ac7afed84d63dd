"""Parts of a decoder layer that Transformers calls otherwise than the checkpoints it loads do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Renamed = Sequence[tuple[str, str]]
"""What a part is called in the model, and in the checkpoint; of two that fit the first counts."""


def stored_part(part: str, renamed: Renamed) -> str:
    """Name in the checkpoint of a module or tensor, both relative to a decoder layer."""
    return _replaced(part, renamed)


def own_part(stored: str, renamed: Renamed) -> str:
    """Name in the model of a module or tensor of the checkpoint: undoes ``stored_part``."""
    return _replaced(stored, ((theirs, own) for own, theirs in renamed))


def _replaced(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    for old, new in pairs:
        if f"{name}.".startswith(f"{old}."):
            return new + name.removeprefix(old)
    return name
