"""What an engine is told beside its checkpoint."""

from __future__ import annotations

from typing import Any


def plugin_options(head: str) -> dict[str, Any]:
    """vLLM's ``--additional-config`` for an output head of the plugin, "dense" or "int8"."""
    return {} if head == "dense" else {"permllm": {"head": head}}
