"""Offline half of PermLLM: decide where every weight goes, and write it down once.

``prune`` and ``evaluate`` do what the commands do; see ``permllm_offline.api``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from permllm_offline.api import Evaluation, evaluate, prune

__all__ = ["Evaluation", "evaluate", "prune"]


def __getattr__(name: str) -> Any:
    """Import the functions when they are asked for: ``--help`` should not wait for them."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from permllm_offline import api

    return getattr(api, name)
