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

from permllm_offline.model.float32_products import batched_product, product
from permllm_offline.sparsity.importance import Scores, mean_score
from permllm_offline.sparsity.mask import keep_channels, pack_channels, unpack_channels
from permllm_vllm.checkpoint.pattern import Pattern

PART_ELEMENTS = 1 << 21
"""Weights of the blocks that are scored, masked, or have their gradient computed at once."""


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
        # Gradients of tied blocks are added in their order. Those of indexing would be added in the
        # order in which threads come to them.
        return None if self.soft is None else self.soft.index_select(0, self.ties)


class PermutedMaskedLinear(nn.Module):
    """Stands in for a frozen ``nn.Linear`` while its group's permutation is learned.

    Beside the weight it holds the mask of the step, one bit for each weight. Importances, and all
    that the gradient takes, are computed for some blocks at a time, and never kept.

    Args:
        linear: the frozen layer; its weight becomes a view of the transposed copy held here.
        scores: of the weight, [out_features, in_features], original channel order.
        pattern: N and M.
        permutation: shared with the other linears of the group, changed between steps.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: Pattern,
        permutation: StepPermutation,
    ) -> None:
        super().__init__()
        self._scores, self._mean = scores, mean_score(scores).clamp_min(1e-30)
        self.weight = nn.Parameter(linear.weight.data.t().contiguous(), requires_grad=False)
        linear.weight.data = self.weight.data.t()
        self.bias = linear.bias
        self.pattern = pattern
        self.permutation = permutation
        self.block_size = linear.in_features // len(permutation.ties)
        self._masked: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = _MaskedProduct.apply(inputs, self.permutation.matrix(), self)
        return output if self.bias is None else output + self.bias

    def importance(self, channels: slice = slice(None)) -> Tensor:
        """Scores of input channels, divided by the mean of all: [channels, out_features].

        The softmax that stands for the mask in the backward pass (Eq. 9) wants scores near 1.
        """
        return (self._scores[:, channels] / self._mean).t().contiguous()

    def mask_bits(self) -> Tensor:
        """The mask of this step, original channel order: as ``pack_channels`` gives it.

        It is chosen once for each order that the permutation is given.
        """
        order = self.permutation.order
        if self._masked is None or self._masked[0] is not order:
            parts = [self._choose(channels) for channels in self.parts()]
            self._masked = order, torch.cat(parts)
        return self._masked[1]

    def _choose(self, channels: slice) -> Tensor:
        local = self.permutation.order[channels] - channels.start
        mask = keep_channels(self.importance(channels).index_select(0, local), self.pattern)
        return pack_channels(mask.view(torch.uint8).index_select(0, local.argsort()))

    def parts(self) -> list[slice]:
        """Cut the input channels into whole blocks, of about ``PART_ELEMENTS`` weights."""
        channels, outputs = self.weight.shape
        count = max(1, PART_ELEMENTS // (outputs * self.block_size)) * self.block_size
        return [slice(first, min(first + count, channels)) for first in range(0, channels, count)]


class _MaskedProduct(torch.autograd.Function):
    """x @ (W * mask)^T, differentiable in x and, straight-through, in the permutation matrix."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, matrix: Tensor | None, layer: PermutedMaskedLinear
    ) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.layer, ctx.order, ctx.bits = layer, layer.permutation.order, layer.mask_bits()
        return product(inputs, layer.weight * unpack_channels(ctx.bits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (inputs,), layer = ctx.saved_tensors, ctx.layer
        through_inputs, through_matrix = [], []
        for channels in layer.parts():
            weight = layer.weight[channels]
            mask = unpack_channels(ctx.bits[channels.start // 8 : channels.stop // 8])
            if ctx.needs_input_grad[0]:
                through_inputs.append(product(gradient, (weight * mask).t()))
            if ctx.needs_input_grad[1]:
                part = inputs[..., channels].flatten(0, -2)
                mask_gradient = product(part.t(), gradient.flatten(0, -2))
                mask_gradient *= weight
                order = ctx.order[channels] - channels.start
                found = matrix_gradient(
                    mask_gradient,
                    layer.importance(channels),
                    mask.index_select(0, order),
                    order,
                    layer.pattern,
                    layer.block_size,
                )
                through_matrix.append(found)
        return _joined(through_inputs, -1), _joined(through_matrix, 0), None


def _joined(parts: list[Tensor], dim: int) -> Tensor | None:
    return torch.cat(parts, dim) if parts else None


def matrix_gradient(
    mask_gradient: Tensor,
    importance: Tensor,
    mask: Tensor,
    order: Tensor,
    pattern: Pattern,
    block_size: int,
) -> Tensor:
    """Gradient of the block-diagonal permutation matrix, through scores and through the mask.

    Rows are the input channels of whole blocks: ``mask_gradient`` and ``importance`` [channels,
    out_features] in the original order, ``mask`` in that of the positions, ``order`` position ->
    channel among them. [blocks, block_size, block_size] comes back.

    With S the importance, P the matrix and M = softmax(S P) P^T the mask in the original order
    (Eq. 8-9), dP = S^T d(S P) + dM^T softmax(S P), the latter hardened.
    """
    blocks = len(mask_gradient) // block_size
    importance = importance.to(mask_gradient.dtype)
    groups = (-1, pattern.group)
    soft_mask = importance.index_select(0, order).unflatten(0, groups).softmax(dim=1)
    score_gradient = mask_gradient.index_select(0, order).unflatten(0, groups) * soft_mask
    score_gradient -= soft_mask * _sum_of_group(score_gradient)

    def by_block(tensor: Tensor) -> Tensor:
        return tensor.reshape(blocks, block_size, -1)

    through_score = batched_product(by_block(importance), by_block(score_gradient).transpose(1, 2))
    through_mask = batched_product(
        by_block(mask_gradient), by_block(mask.to(importance.dtype)).transpose(1, 2)
    )
    return (through_score + through_mask).float()


def _sum_of_group(grouped: Tensor) -> Tensor:
    """[groups, M, out] -> [groups, 1, out]; whole rows added, several times faster than sum(1)."""
    total, *others = grouped.unbind(1)
    for other in others:
        total = total + other
    return total.unsqueeze(1)
