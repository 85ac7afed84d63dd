"""What fewer bytes in the linear layers can gain at most, beside a head that stays dense."""

from dataclasses import dataclass
from pathlib import Path

import torch

from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source, open_source
from permllm_offline.model.prune_plan import make_plan
from permllm_vllm.checkpoint.pattern import Pattern


@dataclass(frozen=True)
class DecodedWeights:
    """Weights that a decoded token reads: of the decoder's linear layers, and of the output head.

    Of experts those that a token goes to. Norms, biases, routers, the KV cache, what is not pruned
    in a layer, and one row of the embedding are left out.
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


def decoded_weights(source: Source) -> DecodedWeights:
    """Count the weights of a model by its configuration.

    Raises:
        OfflineError: its family is unknown.
    """
    plan = make_plan(source, Pattern(2, 4), None, permuted=False, dtype=torch.bfloat16)
    return DecodedWeights(
        linears=round(sum(linear.work for linear in plan.every_linear)),
        head=source.config.vocab_size * source.config.hidden_size,
    )


def of_checkpoint(model: Path) -> DecodedWeights | None:
    """Count the weights of a checkpoint; None where its family is unknown."""
    try:
        return decoded_weights(open_source(str(model)))
    except OfflineError:
        return None
