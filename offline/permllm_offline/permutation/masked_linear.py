"""A linear layer under the mask of a permutation, with the straight-through gradient.

The forward pass multiplies by the frozen weight with its pruned entries zeroed, in the original
channel order. The backward pass needs no C x C matrix: permuting is a gather of rows of the
transposed weight, and the gradient of the block-diagonal permutation matrix is a batched product
of [block, out] slices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from permllm_offline.mask import keep_channels
from permllm_vllm.checkpoint.pattern import Pattern


@dataclass
class StepPermutation:
    """The permutation of one shared-input group in the current learning step.

    ``order`` is int64 [in_features], position -> channel of the whole layer. ``soft`` is
    [independent permutations, block_size, block_size] and block b uses ``soft[ties[b]]``; only
    its gradient is used (straight-through, Eq. 7), since ``order`` is its value in the forward
    pass. ``soft`` is None where no gradient is wanted.
    """

    order: Tensor
    ties: Tensor
    soft: Tensor | None = None

    def matrix(self) -> Tensor | None:
        """The soft permutation of every block, [blocks, block_size, block_size]."""
        return None if self.soft is None else self.soft[self.ties]


class PermutedMaskedLinear(nn.Module):
    """Stands in for a frozen ``nn.Linear`` while its group's permutation is learned.

    Args:
        linear: the frozen layer; its weight becomes a view of the transposed copy held here.
        importance: [out_features, in_features], original channel order.
        pattern: N and M.
        permutation: shared with the other linears of the group, changed between steps.
    """

    def __init__(
        self,
        linear: nn.Linear,
        importance: Tensor,
        pattern: Pattern,
        permutation: StepPermutation,
    ) -> None:
        super().__init__()
        self.weight = linear.weight.data.t().contiguous()
        linear.weight.data = self.weight.t()
        self.bias = linear.bias
        # The softmax that stands for the mask in the backward pass (Eq. 9) wants scores near 1.
        self.importance = (importance / importance.mean().clamp_min(1e-30)).t().contiguous()
        self.pattern = pattern
        self.permutation = permutation

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = _MaskedProduct.apply(
            inputs,
            self.permutation.matrix(),
            self.weight,
            self.importance,
            self.permutation.order,
            self.pattern,
        )
        return output if self.bias is None else output + self.bias


class _MaskedProduct(torch.autograd.Function):
    """x @ (W * mask)^T, differentiable in x and, straight-through, in the permutation matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        matrix: Tensor | None,
        weight: Tensor,
        importance: Tensor,
        order: Tensor,
        pattern: Pattern,
    ) -> Tensor:
        # Bytes, not booleans: they convert to floating point several times faster.
        mask = keep_channels(importance.index_select(0, order), pattern).view(torch.int8)
        # The mask goes back into the original order, so neither weight nor input is gathered.
        sparse = weight * mask.index_select(0, order.argsort())
        ctx.save_for_backward(inputs, sparse, mask)
        ctx.constants = weight, importance, order, pattern, None if matrix is None else matrix.shape
        return inputs @ sparse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, sparse, mask = ctx.saved_tensors
        weight, importance, order, pattern, shape = ctx.constants
        input_gradient = gradient @ sparse.t() if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return input_gradient, None, None, None, None, None
        mask_gradient = inputs.flatten(0, -2).t() @ gradient.flatten(0, -2)
        mask_gradient *= weight
        found = matrix_gradient(mask_gradient, importance, mask, order, pattern, shape)
        return input_gradient, found, None, None, None, None


def matrix_gradient(
    mask_gradient: Tensor,
    importance: Tensor,
    mask: Tensor,
    order: Tensor,
    pattern: Pattern,
    shape: torch.Size,
) -> Tensor:
    """Gradient of the block-diagonal permutation matrix, through scores and through the mask.

    Rows are input channels: ``mask_gradient`` and ``importance`` [in_features, out_features] in the
    original order, ``mask`` in that of the positions; ``shape`` is that of the matrices of all
    blocks.

    With S the importance, P the matrix and M = softmax(S P) P^T the mask in the original order
    (Eq. 8-9), dP = S^T d(S P) + dM^T softmax(S P), the latter hardened.
    """
    blocks, block_size, _ = shape
    importance = importance.to(mask_gradient.dtype)
    groups = (-1, pattern.group)
    soft_mask = importance.index_select(0, order).unflatten(0, groups).softmax(dim=1)
    score_gradient = mask_gradient.index_select(0, order).unflatten(0, groups) * soft_mask
    score_gradient -= soft_mask * _sum_of_group(score_gradient)

    def by_block(tensor: Tensor) -> Tensor:
        return tensor.reshape(blocks, block_size, -1)

    through_score = by_block(importance) @ by_block(score_gradient).transpose(1, 2)
    through_mask = by_block(mask_gradient) @ by_block(mask.to(importance.dtype)).transpose(1, 2)
    return (through_score + through_mask).float()


def _sum_of_group(grouped: Tensor) -> Tensor:
    """[groups, M, out] -> [groups, 1, out]; whole rows added, several times faster than sum(1)."""
    total, *others = grouped.unbind(1)
    for other in others:
        total = total + other
    return total.unsqueeze(1)
