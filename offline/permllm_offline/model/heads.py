"""Attention geometry of the decoder layers, and which of them read the values of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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


def heads_of(config: Any, layer: int) -> Heads:
    """Return the attention geometry of a decoder layer, from a transformers configuration.

    It is the same in all layers but where the configuration says what differs, as Gemma 4's does.
    """
    differs = getattr(config, "is_heterogeneous", False)
    own = config.per_layer_config[layer] if differs else config
    query = int(own.num_attention_heads)
    key_value = int(getattr(own, "num_key_value_heads", None) or query)
    size = int(getattr(own, "head_dim", None) or own.hidden_size // query)
    return Heads(query, key_value, size)


def cached_channels(config: Any, layer: int) -> int:
    """Numbers that a decoder layer keeps of each token: its key and value, or what both come from.

    The latter is latent attention: a vector and a rotated part, for all heads together.
    """
    rank = getattr(config, "kv_lora_rank", None)
    if rank is not None:
        return int(rank) + int(config.qk_rope_head_dim)
    heads = heads_of(config, layer)
    return 2 * heads.key_value * heads.size


def layers_that_share(config: Any) -> range:
    """Numbers of the decoder layers that read keys and values of earlier ones, the last layers."""
    shared = getattr(config, "num_kv_shared_layers", None) or 0
    return range(config.num_hidden_layers - shared, config.num_hidden_layers)


def layers_that_hand_on(config: Any) -> frozenset[int]:
    """Numbers of the decoder layers whose keys and values others may read too.

    They are the last of each kind of attention before those that share. Where none shares, drafts
    of the model still read them.
    """
    own = config.layer_types[: layers_that_share(config).start]
    return frozenset({kind: layer for layer, kind in enumerate(own)}.values())


def layers_with_keys_as_values(config: Any) -> frozenset[int]:
    """Numbers of the decoder layers whose values are their keys, before norm and rotation."""
    if not getattr(config, "attention_k_eq_v", False):
        return frozenset()
    own = range(layers_that_share(config).start)
    return frozenset(one for one in own if config.layer_types[one] == "full_attention")
