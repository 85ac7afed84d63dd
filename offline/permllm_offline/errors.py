"""The one error that a user of the command line can cause."""

from __future__ import annotations


class OfflineError(ValueError):
    """An input that cannot be used: the message says what was found, the rule and the remedy."""
