"""How the blocks of one shared-input group are tied, and which rows its permutation folds into."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Fold, SharedInputGroup
from permllm_offline.model.heads import Heads
from permllm_vllm.checkpoint.ignoring import REGEX_PREFIX
from permllm_vllm.checkpoint.schema import BLOCK_SIZES


@dataclass(frozen=True)
class GroupLayout:
    """A shared-input group of one model: its size, its tied blocks, and whether it folds."""

    group: SharedInputGroup
    in_features: int
    block_size: int
    heads: Heads

    @property
    def folded(self) -> bool:
        """Whether the permutation costs nothing at run time."""
        if self.group.fold is Fold.VALUE_HEADS:
            return self.heads.size % self.block_size == 0
        return self.group.fold is Fold.ELEMENTWISE

    def at_run_time(self) -> GroupLayout:
        """The same group, its permutation applied at run time."""
        return replace(self, group=self.group.at_run_time())

    @property
    def num_blocks(self) -> int:
        """Blocks of ``block_size`` input channels."""
        return self.in_features // self.block_size

    def ties(self) -> Tensor:
        """Independent permutation that each block uses.

        Query heads that share a value head share their blocks, because the permutation moves
        into the rows of that value head.

        Returns:
            int64 [num_blocks], values 0..number of independent blocks - 1.
        """
        blocks = torch.arange(self.num_blocks)
        if not self.folded or self.group.fold is not Fold.VALUE_HEADS:
            return blocks
        per_head = self.heads.size // self.block_size
        head, inside = blocks // per_head, blocks % per_head
        return head // self.heads.queries_per_value * per_head + inside

    def expand(self, order: Tensor) -> Tensor:
        """Give every block the permutation it is tied to.

        Args:
            order: int64 [independent permutations, block_size], position -> channel.

        Returns:
            block-local uint8 [in_features]; int64 where one block is too wide for bytes, which
            only a permutation across blocks has.
        """
        dtype = torch.uint8 if self.block_size <= 256 else torch.int64
        return order[self.ties()].flatten().to(dtype)

    def rows(self, permutation: Tensor) -> Tensor:
        """Permutation of the preceding linear's rows that stands for ``permutation``.

        Args:
            permutation: block-local uint8 [in_features], or other numbers of channels, equal in
                tied blocks.

        Returns:
            the same of the rows of each part in ``fold_into``.
        """
        if self.group.fold is not Fold.VALUE_HEADS:
            return permutation
        heads = self.heads
        shape = (heads.key_value, heads.queries_per_value, heads.size)
        return permutation.reshape(shape)[:, 0].reshape(-1)

    @property
    def can_smooth(self) -> bool:
        """Whether what feeds the input channels can be divided by numbers, one for each."""
        return bool(self.group.norm) or any(part.proportional for part in self.group.fold_into)

    def tied(self, channels: Tensor) -> Tensor:
        """Give channels that come from one row, of several query heads, the mean of their numbers.

        Args:
            channels: floating [in_features].
        """
        if self.group.fold is not Fold.VALUE_HEADS:
            return channels
        heads = self.heads
        shape = (heads.key_value, heads.queries_per_value, heads.size)
        mean = channels.reshape(shape).mean(1, keepdim=True)
        return mean.expand(shape).reshape(-1)

    def check_blocks(self, module: str) -> None:
        """Raise OfflineError unless whole blocks cover the input channels of ``module``."""
        if self.in_features % self.block_size == 0:
            return
        dividing = [str(size) for size in BLOCK_SIZES if self.in_features % size == 0]
        sizes = f"block size {' or '.join(dividing)}, or " if dividing else ""
        raise OfflineError(
            f"{module} has {self.in_features} input channels, which is not a multiple of the "
            f"block size {self.block_size}: a permuted layer needs whole blocks. For this one give "
            f"{sizes}{self.ignoring()} to leave it dense, or a --method without permutation: "
            "magnitude, wanda, ria or sparsegpt."
        )

    def ignoring(self) -> str:
        """The option that leaves the group dense in every decoder layer, and all that must go too.

        Of experts those are all of a layer.
        """
        if self.group.experts:
            regex = rf".*\.{re.escape(self.group.experts.rpartition('.')[2])}\..*"
        else:
            regex = rf".*\.({'|'.join(map(re.escape, self.group.linears))})"
        return f"--ignore {shlex.quote(REGEX_PREFIX + regex)}"
