"""What tells two runs apart: a text with one fact in each line, `name: value`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SHOWN = 3
"""Differences that a message names."""


def identity_text(facts: Mapping[str, Any]) -> str:
    """One line for each fact; those inside a mapping have its name before their own."""
    return "\n".join(_lines(facts, ""))


def model_facts(config: Path, weights: Iterable[Path]) -> dict[str, Any]:
    """What tells a model from others: the contents of its config, size and time of its weights."""
    files = {file.name: file.stat() for file in weights}
    return {
        config.name: hashlib.sha256(config.read_bytes()).hexdigest()[:16],
        **{name: (one.st_size, one.st_mtime_ns) for name, one in files.items()},
    }


def differences(found: str, wanted: str) -> str:
    """Say which facts of two identities differ, the first few with both of their values."""
    there, here = _facts(found), _facts(wanted)
    names = [name for name in {**here, **there} if there.get(name) != here.get(name)]
    if not set(there) & set(here):
        return "another version wrote them"
    shown = [
        f"{name} is {there.get(name, 'not given')} there and {here.get(name, 'not given')} here"
        for name in names[:SHOWN]
    ]
    more = [f"{len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "; ".join(shown + more)


def _lines(facts: Mapping[str, Any], before: str) -> list[str]:
    lines: list[str] = []
    for name, value in facts.items():
        if isinstance(value, Mapping):
            lines += _lines(value, f"{before}{name}.")
        else:
            lines.append(f"{before}{name}: {value!r}")
    return lines


def _facts(text: str) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
