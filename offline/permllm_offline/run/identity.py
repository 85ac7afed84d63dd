"""What tells two runs apart: a text with one fact in each line, `name: value`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SHOWN = 3
"""Differences that a message names."""


def identity_text(facts: Mapping[str, Any]) -> str:
    """One line for each fact; those inside a mapping have its name before their own."""
    return "\n".join(_lines(facts, ""))


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
