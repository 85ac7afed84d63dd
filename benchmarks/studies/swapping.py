"""Search for the permutation of one block by swaps, for the score that is kept or for the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from permllm_offline.sparsity.mask import keep_channels
from permllm_vllm.checkpoint.pattern import Pattern

SWEEPS = 2
"""Rounds over all pairs of groups at most; the first finds most of what there is to find."""

Gain = Callable[[Tensor, Tensor], Tensor]
"""Of the swaps of one pair of groups: int64 [channels of both], bool [swaps, channels, rows] of
what each swap keeps -> how good each is, [swaps]."""


def swaps(size: int) -> Tensor:
    """All exchanges of a channel of one group with one of another; the first exchanges nothing.

    Returns:
        int64 [1 + size * size, 2 * size], position -> channel among those of both. Each row is its
        own inverse.
    """
    arrangements = torch.arange(2 * size).repeat(1 + size * size, 1)
    for number in range(size * size):
        first, second = number // size, size + number % size
        arrangements[1 + number, [first, second]] = torch.tensor([second, first])
    return arrangements


class Block:
    """The channels of one block under a permutation that is improved.

    Args:
        weight: float32 [rows, channels], original order.
        importance: float32 [rows, channels].
        moment: float32 [channels, channels], the sum of x x^T over tokens.
        order: int64 [channels], position -> channel, where to start.
        pattern: N and M.
    """

    def __init__(
        self, weight: Tensor, importance: Tensor, moment: Tensor, order: Tensor, pattern: Pattern
    ) -> None:
        # Channels are rows here, so that everything runs over contiguous memory.
        self._weight, self._importance = weight.t().contiguous(), importance.t().contiguous()
        self._moment, self._pattern = moment, pattern
        self.groups = order.reshape(-1, pattern.group).clone()
        self._swaps = swaps(pattern.group)
        mask = keep_channels(self._importance[order], pattern)[order.argsort()]
        self._pruned = self._weight * ~mask

    @property
    def order(self) -> Tensor:
        """int64 [channels], position -> channel."""
        return self.groups.flatten()

    def score_gain(self, channels: Tensor, keeps: Tensor) -> Tensor:
        """Importance that is kept."""
        return (keeps * self._importance[channels]).sum(2).double().sum(1)

    def loss_gain(self, channels: Tensor, keeps: Tensor) -> Tensor:
        """By how much the squared error of the output falls."""
        change = self._weight[channels] * ~keeps - self._pruned[channels]
        slope = self._moment[channels] @ self._pruned
        error = 2 * slope + self._moment[channels][:, channels] @ change
        return -(change * error).sum(2).double().sum(1)

    def improve(self, gain: Gain, sweeps: int = SWEEPS) -> Tensor:
        """Exchange channels of pairs of groups while that gains, and return the order."""
        for _ in range(sweeps):
            moved = False
            for first in range(len(self.groups)):
                for second in range(first + 1, len(self.groups)):
                    moved |= self._exchange(first, second, gain)
            if not moved:
                break
        return self.order

    def _exchange(self, first: int, second: int, gain: Gain) -> bool:
        size = self._pattern.group
        channels = torch.cat([self.groups[first], self.groups[second]])
        arranged = self._importance[channels[self._swaps]]
        keeps = keep_channels(arranged.flatten(0, 1), self._pattern).reshape(arranged.shape)
        # From positions back to channels: each swap undoes itself.
        keeps = keeps[torch.arange(len(keeps))[:, None], self._swaps]
        gains = gain(channels, keeps)
        best = int(gains.argmax())
        # Rounding alone must not move channels.
        if gains[best] <= gains[0] + 1e-6 * gains[best].abs():
            return False
        swapped = channels[self._swaps[best]]
        self.groups[first], self.groups[second] = swapped[:size], swapped[size:]
        self._pruned[channels] = self._weight[channels] * ~keeps[best]
        return True
