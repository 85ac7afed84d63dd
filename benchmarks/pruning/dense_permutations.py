"""The loop of the paper as it stands there: the peer that `benchmarks.offline_cost` measures.

Written from arXiv 2510.10136 and from what its authors' code is known to do; none of it is copied.
Each step builds the C x C block-diagonal permutation matrix of every layer, multiplies scores and
masks with it under plain autograd, and solves every block by scipy, one after the other.

Where paper and code differ it follows the code: logits in the model's dtype, times a learned scale,
clamped so that their gradient passes; a temperature by epoch; both factors of the un-permuted mask
differentiated at the soft mask; the permutation of the last forward pass stays. What it does not
follow: the loss is in float32, windows are shuffled and the rate falls from step to step, of which
nothing is known there, and the hard mask goes back by a gather, which is no slower than a product.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from permllm_vllm.checkpoint.pattern import Pattern

SINKHORN_ITERATIONS = 5
LEARNING_RATE, WEIGHT_DECAY = 1e-3, 0.1
TEMPERATURES = (1.0, 0.1)


def epoch_temperature(epoch: int, epochs: int) -> float:
    """Temperature in an epoch, 0..epochs-1: linear, and one epoch short of the second."""
    first, last = TEMPERATURES
    return first + epoch / epochs * (last - first)


def sequence_norm(root_mean_square: Tensor, sequence_length: int) -> Tensor:
    """Root of the squares of an input channel, summed over tokens and divided by sequences.

    The softmax behind the mask depends on this scale, the mask itself does not.

    Args:
        root_mean_square: [in_features], over all tokens.
        sequence_length: tokens of each sequence.
    """
    return root_mean_square * sequence_length**0.5


def straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another."""
    return (value - gradient).detach() + gradient


class DensePermutation(nn.Module):
    """The permutation of one shared-input group, as a dense matrix.

    Args:
        channels: a multiple of ``block_size``.
        block_size: channels per block.
        generator: of the noise that learning starts from.
    """

    def __init__(self, channels: int, block_size: int, generator: torch.Generator) -> None:
        super().__init__()
        shape = (channels // block_size, block_size, block_size)
        noise = (2 * torch.rand(shape, generator=generator) - 1) / block_size**0.5
        self.weight = nn.Parameter(noise)
        self.scale = nn.Parameter(torch.tensor(block_size**0.5))
        self.temperature = TEMPERATURES[0]

    def forward(self) -> Tensor:
        """The hard matrix [channels, channels], with the gradient of the soft one (Eq. 2-7)."""
        logits = self.weight * self.scale
        logits = straight_through(logits.clamp(-1, 1), logits)
        soft = (logits / self.temperature).softmax(dim=-1)
        for _ in range(SINKHORN_ITERATIONS):
            soft = soft / soft.sum(-1, keepdim=True)
            soft = soft / soft.sum(-2, keepdim=True)
        hard = torch.zeros_like(soft)
        for block, scores in enumerate(soft.detach().float().cpu().numpy()):
            rows, columns = linear_sum_assignment(scores, maximize=True)
            hard[block, rows, columns] = 1.0
        return torch.block_diag(*straight_through(hard, soft))


@dataclass
class SharedMatrix:
    """The dense matrix of a group in one forward pass: made by the first linear that asks."""

    permutation: DensePermutation
    matrix: Tensor | None = field(default=None)

    def get(self, dtype: torch.dtype) -> Tensor:
        """The matrix, made once until ``forget``."""
        if self.matrix is None:
            self.matrix = self.permutation()
        return self.matrix.to(dtype)

    def forget(self) -> None:
        """The logits have moved: make it again."""
        self.matrix = None


class DenseMaskedLinear(nn.Module):
    """A frozen linear under the mask of a dense permutation matrix (Eq. 8-9).

    Args:
        linear: frozen.
        importance: [out_features, in_features].
        pattern: N and M.
        shared: the matrix of its group.
    """

    def __init__(
        self, linear: nn.Linear, importance: Tensor, pattern: Pattern, shared: SharedMatrix
    ) -> None:
        super().__init__()
        self.linear, self.pattern, self.shared = linear, pattern, shared
        self.importance = importance.to(linear.weight.dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        return functional.linear(inputs, self.linear.weight * self.mask(), self.linear.bias)

    def mask(self) -> Tensor:
        """[out_features, in_features] in the original channel order, with its gradient.

        The value is that of the hard mask, the gradient that of ``softmax(S P) P^T``.
        """
        matrix = self.shared.get(self.importance.dtype)
        groups = (self.importance @ matrix).unflatten(1, (-1, self.pattern.group))
        soft = groups.softmax(dim=-1)
        kept = groups.topk(self.pattern.kept, dim=-1).indices
        hard = torch.zeros_like(soft).scatter(-1, kept, 1.0).flatten(1)
        position = matrix.detach().argmax(dim=1)
        return straight_through(hard.index_select(1, position), soft.flatten(1) @ matrix.t())
