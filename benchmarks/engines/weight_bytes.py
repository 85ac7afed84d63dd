"""What fewer bytes in the linear layers can gain at most, beside a head that stays dense."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class DecodedWeights:
    """Weights that a decoded token reads: of the decoder's linear layers, and of the output head.

    Of experts those that a token goes to. Norms, biases, routers, the KV cache and one row of the
    embedding are left out.
    """

    linears: int
    head: int

    def byte_ratio(self, share: float, head_share: float = 1.0) -> float:
        """Dense bytes over those with linear layers of `share` of their bytes (0: free).

        How many times as fast one sequence can decode if both sides read memory at one rate.

        Args:
            share: of the bytes of the linear layers in bfloat16, that are left.
            head_share: the same of the output head.
        """
        return (self.linears + self.head) / (share * self.linears + head_share * self.head)


def decoded_weights(config: Mapping[str, Any]) -> DecodedWeights:
    """Count the weights of a Llama, or of one with experts, by its configuration in Transformers.

    Raises:
        KeyError: the configuration is not one of a Llama or its kin.
    """
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    attention = 2 * heads * head * hidden  # q and o
    attention += 2 * config["num_key_value_heads"] * head * hidden  # k and v
    width = config.get("moe_intermediate_size") or config["intermediate_size"]
    experts = config.get("num_experts_per_tok") or 1
    feed_forward = experts * 3 * width * hidden  # gate, up and down
    return DecodedWeights(
        linears=config["num_hidden_layers"] * (attention + feed_forward),
        head=config["vocab_size"] * hidden,
    )


def of_checkpoint(model: Path) -> DecodedWeights | None:
    """Count the weights of a checkpoint; None where its configuration is not like a Llama's."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    try:
        return decoded_weights(config)
    except KeyError:
        return None
