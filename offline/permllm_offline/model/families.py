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
from permllm_offline.model.row_parts import (
    RowPart,
    every_row,
    first_half,
    second_half,
    values_last,
    values_of_each_head,
)


class Fold(Enum):
    """What lies between a shared-input group and the linears whose rows feed it."""

    NONE = "none"
    """A norm of the residual stream, or a linear that stays as it is: the permutation is applied at
    run time."""
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
    fold_into: tuple[RowPart, ...] = ()


@dataclass(frozen=True)
class Family:
    """Module names of one architecture; ``linears`` are relative to a decoder layer."""

    layers: str
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


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_VALUES = (RowPart("self_attn.v_proj", every_row),)

_LLAMA = Family(
    layers="model.layers",
    groups=(
        SharedInputGroup("qkv", _QKV),
        SharedInputGroup("o", ("self_attn.o_proj",), Fold.VALUE_HEADS, _VALUES),
        SharedInputGroup("gate_up", ("mlp.gate_proj", "mlp.up_proj")),
        SharedInputGroup(
            "down",
            ("mlp.down_proj",),
            Fold.ELEMENTWISE,
            (RowPart("mlp.gate_proj", every_row), RowPart("mlp.up_proj", every_row)),
        ),
    ),
    ignore=("lm_head",),
)

_OPT = Family(
    layers="model.decoder.layers",
    groups=(
        SharedInputGroup("qkv", _QKV),
        SharedInputGroup("o", ("self_attn.out_proj",), Fold.VALUE_HEADS, _VALUES),
        SharedInputGroup("fc1", ("fc1",)),
        SharedInputGroup("fc2", ("fc2",), Fold.ELEMENTWISE, (RowPart("fc1", every_row),)),
    ),
    ignore=("lm_head", "model.decoder.project_in", "model.decoder.project_out"),
)

_PHI3 = Family(
    layers="model.layers",
    groups=(
        SharedInputGroup("qkv", ("self_attn.qkv_proj",)),
        SharedInputGroup(
            "o",
            ("self_attn.o_proj",),
            Fold.VALUE_HEADS,
            (RowPart("self_attn.qkv_proj", values_last),),
        ),
        SharedInputGroup("gate_up", ("mlp.gate_up_proj",)),
        SharedInputGroup(
            "down",
            ("mlp.down_proj",),
            Fold.ELEMENTWISE,
            (RowPart("mlp.gate_up_proj", first_half), RowPart("mlp.gate_up_proj", second_half)),
        ),
    ),
    ignore=("lm_head",),
)

_GPT_NEOX = Family(
    layers="gpt_neox.layers",
    groups=(
        SharedInputGroup("qkv", ("attention.query_key_value",)),
        SharedInputGroup(
            "o",
            ("attention.dense",),
            Fold.VALUE_HEADS,
            (RowPart("attention.query_key_value", values_of_each_head),),
        ),
        SharedInputGroup("fc1", ("mlp.dense_h_to_4h",)),
        SharedInputGroup(
            "fc2",
            ("mlp.dense_4h_to_h",),
            Fold.ELEMENTWISE,
            (RowPart("mlp.dense_h_to_4h", every_row),),
        ),
    ),
    ignore=("lm_head", "embed_out"),
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "opt": _OPT,
    "phi3": _PHI3,
    "gpt_neox": _GPT_NEOX,
}


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
            "permllm_offline/model/families.py (its module names, shared-input groups and folds) "
            "and a test that its folded model equals the masked dense one."
        )
    return FAMILIES[model_type]


def begin_token(config: Any) -> int | None:
    """Return the token that every text must begin with, or None.

    Gemma answers nonsense without its token for the beginning of a sequence, so every window gets
    it, as in lm-eval. Other models go without, so that perplexities are those of the literature.
    """
    if not str(getattr(config, "model_type", None)).startswith("gemma"):
        return None
    token: int | None = config.bos_token_id
    return token


def heads_of(config: Any) -> Heads:
    """Return the attention geometry of a transformers configuration."""
    query = int(config.num_attention_heads)
    key_value = int(getattr(config, "num_key_value_heads", None) or query)
    size = int(getattr(config, "head_dim", None) or config.hidden_size // query)
    return Heads(query, key_value, size)
