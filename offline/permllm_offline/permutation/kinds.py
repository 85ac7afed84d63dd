"""The kinds of permutation that a method can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from permllm_offline.calibration.calibrated_model import Calibrated, LearnedPermutations
from permllm_offline.model.layout import GroupLayout
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.permutation.learning import learn_permutations
from permllm_offline.permutation.linear_assignment import assign_group
from permllm_offline.sparsity.importance import Scores
from permllm_vllm.checkpoint.pattern import Pattern

Allocation = Callable[[GroupLayout, Mapping[str, Scores], Pattern], Tensor]
"""Finds the permutation of one shared-input group from the importance of its linears.

Returns int64 [independent permutations, block_size]: position -> channel.
"""

Learning = Callable[[Calibrated], LearnedPermutations]
"""Finds the permutations of a whole model."""


@dataclass(frozen=True)
class PermutationKind:
    """An entry of the table: from one group alone, from the whole model, or neither.

    ``across_blocks`` moves channels through a whole layer, which no checkpoint can hold.
    """

    summary: str
    allocate: Allocation | None = None
    learn: Learning | None = None
    across_blocks: bool = False

    @property
    def learns(self) -> bool:
        """Whether it is found in steps that the whole model, or a part of it, takes."""
        return self.learn is not None

    @property
    def assigns(self) -> bool:
        """Whether linear sum assignments find it, for which all rows of a block are scored."""
        return self.allocate is assign_group

    @property
    def permutes(self) -> bool:
        """Whether it moves channels."""
        return self.allocate is not None or self.learns


PERMUTATIONS: Mapping[str, PermutationKind] = {
    "none": PermutationKind("every channel stays where it is"),
    "cp": PermutationKind(
        "heuristic channel reallocation within each block", allocate=allocate_group
    ),
    "cp-lsa": PermutationKind(
        "cp refined by linear sum assignment, within each block",
        allocate=assign_group,
    ),
    "cp-global": PermutationKind(
        "cp-lsa over all channels of a layer, as the paper does it: for studies, not servable",
        allocate=assign_group,
        across_blocks=True,
    ),
    "learned": PermutationKind("learned within each block", learn=learn_permutations),
}
