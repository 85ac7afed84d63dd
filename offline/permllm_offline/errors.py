"""The one error that a user of the command line can cause, and how it quotes another."""

from __future__ import annotations


class OfflineError(ValueError):
    """An input that cannot be used: the message says what was found, the rule and the remedy."""


def first_line(error: BaseException) -> str:
    """The kind of an error of a library, and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
