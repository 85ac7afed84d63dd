"""What a configuration says of the experts of a mixture: how many, and what is done to a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from permllm_offline.errors import OfflineError

GATES = ("silu", "gelu_pytorch_tanh")
"""What the kernel of experts does with a gate, by Transformers' names."""
_EXPERTS = "E"
"""The letter of Nemotron for a layer of experts."""
EXPERT_COUNTS = ("num_local_experts", "num_experts")
"""Names that configurations have for the number of experts of a layer."""


def experts_in(config: Any) -> int:
    """How many a mixture has in a layer; 0 for those of a family of both that has none."""
    kinds = getattr(config, "hybrid_override_pattern", None)  # a letter for each layer
    there = getattr(config, "enable_moe_block", True) and (kinds is None or _EXPERTS in kinds)
    named = (getattr(config, name, None) for name in EXPERT_COUNTS)
    return int(next(filter(None, named), 0)) if there else 0


def experts_taken(config: Any) -> float:
    """How many of them a token goes to, in the mean where layers differ."""
    taken: Any = getattr(config, "num_experts_per_tok", None) or config.top_k_experts
    return sum(taken) / len(taken) if isinstance(taken, Sequence) else taken


def check_gate(config: Any) -> None:
    """Raise OfflineError for a gate that the kernel does not compute."""
    named = (getattr(config, name, None) for name in ("hidden_act", "hidden_activation"))
    activation = next(filter(None, named), "silu")  # the one that classes without a setting have
    if activation not in GATES:
        raise OfflineError(
            f"hidden_act is {activation!r}, but sparse experts are served with "
            f"{' or '.join(map(repr, GATES))} alone: give a mixture with that."
        )
