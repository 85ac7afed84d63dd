"""The one table of model families, by ``config.model_type``.

A family says, relative to one decoder layer, which linears read the same tensor (a shared-input
group) and where the permutation of that tensor can be folded. Nothing else in this package knows
a module's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from permllm_offline.errors import OfflineError


class Fold(Enum):
    """What lies between a shared-input group and the linears whose rows feed it."""

    NONE = "none"
    """A norm of the residual stream: the permutation stays at run time."""
    ELEMENTWISE = "elementwise"
    """Only elementwise operations: output row j of the preceding linears becomes channel j."""
    VALUE_HEADS = "value heads"
    """Attention: value row (kv head, j) becomes channel (query head, j) of each of its heads."""


@dataclass(frozen=True)
class SharedInputGroup:
    """Linears of one decoder layer that read the same tensor and so share one permutation."""

    name: str
    linears: tuple[str, ...]
    fold: Fold = Fold.NONE
    fold_into: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Module names of one architecture; ``linears`` are relative to a decoder layer."""

    layers: str
    final_norm: str
    groups: tuple[SharedInputGroup, ...]
    ignore: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """Every linear of a decoder layer that is pruned, in forward order."""
        return tuple(linear for group in self.groups for linear in group.linears)

    def layer_name(self, layer: int) -> str:
        """Module name of decoder layer ``layer``."""
        return f"{self.layers}.{layer}"


@dataclass(frozen=True)
class Heads:
    """Attention geometry: numbers of query and key/value heads, and channels per head."""

    query: int
    key_value: int
    size: int

    @property
    def queries_per_value(self) -> int:
        """Query heads that read the same value head."""
        return self.query // self.key_value


_LLAMA = Family(
    layers="model.layers",
    final_norm="model.norm",
    groups=(
        SharedInputGroup("qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        SharedInputGroup("o", ("self_attn.o_proj",), Fold.VALUE_HEADS, ("self_attn.v_proj",)),
        SharedInputGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
        SharedInputGroup(
            "down", ("mlp.down_proj",), Fold.ELEMENTWISE, ("mlp.gate_proj", "mlp.up_proj")
        ),
    ),
    ignore=("lm_head",),
)

FAMILIES: Mapping[str, Family] = {"llama": _LLAMA, "mistral": _LLAMA}


def family_of(config: Any) -> Family:
    """Return the family of a transformers configuration.

    Raises:
        OfflineError: its ``model_type`` is not in the table.
    """
    model_type = str(getattr(config, "model_type", None))
    if model_type not in FAMILIES:
        raise OfflineError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(sorted(FAMILIES))}. To add a family, add one entry to FAMILIES in "
            "permllm_offline/families.py (its module names, shared-input groups and folds) and a "
            "test that its folded model equals the masked dense one."
        )
    return FAMILIES[model_type]


def heads_of(config: Any) -> Heads:
    """Return the attention geometry of a transformers configuration."""
    query = int(config.num_attention_heads)
    key_value = int(getattr(config, "num_key_value_heads", None) or query)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // query)
    return Heads(query, key_value, size)
