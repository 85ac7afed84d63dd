"""What a configuration says of the experts of a mixture: how many, and what is done to a gate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from permllm_offline.errors import OfflineError

GATES = ("silu", "gelu_pytorch_tanh")
"""What the kernel of experts does with a gate, by Transformers' names."""
WITHOUT_GATE = ("relu2",)
"""What it does between the two linears of experts that have no gate."""
UNKNOWN_TO_TRANSFORMERS = ("swiglu_limits", "sliding_windows")
"""Settings of single layers, as K-EXAONE 2.0 has them."""
_EXPERTS = "E"
"""The letter of Nemotron for a layer of experts."""
_ACTIVATION_NAMES = ("hidden_act", "hidden_activation", "mlp_hidden_act")
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


def check_form(config: Any, *, gated: bool) -> None:
    """Raise OfflineError for experts that the kernel, or Transformers, does not compute."""
    found = [name for name in _ACTIVATION_NAMES if getattr(config, name, None)]
    # Classes without a setting have silu.
    name, activation = (found[0], getattr(config, found[0])) if found else ("hidden_act", "silu")
    served = GATES if gated else WITHOUT_GATE
    if activation not in served:
        raise OfflineError(
            f"{name} is {activation!r}, but sparse experts are served with "
            f"{' or '.join(map(repr, served))} alone: give a mixture with that."
        )
    for name in UNKNOWN_TO_TRANSFORMERS:
        if any(getattr(config, name, None) or ()):
            raise OfflineError(
                f"{name} is {getattr(config, name)!r}, which vLLM reads and Transformers, by which "
                "models are pruned, does not: give a mixture without."
            )
