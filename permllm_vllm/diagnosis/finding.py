"""What a look at the environment finds."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from importlib import metadata

INSTALL = (
    "install it into the environment that has vLLM and torch, from the project's directory: "
    "pip install 'setuptools>=77' wheel && pip install --no-build-isolation ."
)


class Verdict(Enum):
    """How good a finding is."""

    GOOD = "good"
    NOTE = "note"
    """Worth knowing; nothing is broken."""
    PROBLEM = "problem"
    """Something cannot be done, or not as fast as it could; the remedy says how to change that."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    subject: str
    found: str
    verdict: Verdict = Verdict.GOOD
    remedy: str = ""


def installed(name: str) -> str | None:
    """Version of an installed distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
