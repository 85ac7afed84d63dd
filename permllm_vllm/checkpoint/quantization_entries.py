"""What a `config.json` says of quantization, wherever publishers write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from permllm_vllm.checkpoint.errors import Problem

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""What says in `config.json`, or in its `text_config`, that a model is quantized."""
FROM_BEFORE = "give the model from before its quantization"
"""The remedy where weights cannot be read."""


@dataclass(frozen=True)
class QuantizationEntries:
    """A JSON object of entries, and the keys that lead to it, joined by dots."""

    path: str
    entries: Mapping[str, Any]

    def get(self, key: str) -> Any:
        """Return what is said under a key; None where nothing is."""
        return self.entries.get(key)

    def inside(self, key: str) -> QuantizationEntries:
        """Return the entries of an entry; raises `CheckpointError` for anything but an object."""
        return _object(f"{self.path}.{key}", self.entries.get(key))

    def problem(self, key: str, value: str, rule: str) -> Problem:
        """Return what to say of an entry, or of an entry of one, that cannot be read."""
        return _problem(f"{self.path}.{key}", value, rule)


def quantization_entries(config: Mapping[str, Any]) -> QuantizationEntries | None:
    """Return what a `config.json` says of quantization; None where it says nothing.

    Of what stands inside one another, as in older `compression_config`s, the inner entries count,
    and the outer ones that these lack. Raises `CheckpointError` for anything but JSON objects.
    """
    for path, place in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(place, Mapping):
            continue
        for key in QUANTIZATION_KEYS:
            found = _object(f"{path}{key}", place.get(key))
            if found.entries:
                return _innermost(found)
    return None


def _innermost(outer: QuantizationEntries) -> QuantizationEntries:
    inner = outer.inside(QUANTIZATION_KEYS[0])
    if not inner.entries:
        return outer
    around = {key: one for key, one in outer.entries.items() if key != QUANTIZATION_KEYS[0]}
    return QuantizationEntries(inner.path, {**around, **inner.entries})


def _object(path: str, found: object) -> QuantizationEntries:
    """Entries at a path, none for null."""
    if found is None:
        return QuantizationEntries(path, {})
    if not isinstance(found, Mapping):
        raise _problem(path, repr(found), "a JSON object").as_error()
    return QuantizationEntries(path, found)


def _problem(path: str, value: str, rule: str) -> Problem:
    return Problem(f"config.json {path}", value, rule, FROM_BEFORE)
