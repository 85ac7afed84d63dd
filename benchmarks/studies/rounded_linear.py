"""A linear layer of int4 values whose groups follow the permutation that is learned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from benchmarks.studies.rounding import LARGEST_INT4
from permllm_offline.permutation.masked_linear import (
    PermutedMaskedLinear,
    StepPermutation,
    matrix_gradient,
)
from permllm_offline.sparsity.importance import Scores
from permllm_offline.sparsity.mask import keep_channels
from permllm_vllm.checkpoint.pattern import Pattern


class RoundedLinear(PermutedMaskedLinear):
    """A ``PermutedMaskedLinear`` that multiplies with int4 values.

    Their groups are formed in the order of the step. Rounding is straight-through (the gradient of
    a rounded value is that of the value), and so is the largest magnitude of a group, the end of
    its grid: backward it is the mean of the group's magnitudes, weighted by their softmax, as the
    softmax of the scores stands for the mask (Eq. 9).

    Args:
        linear: the frozen layer.
        scores: of the weight, [out_features, in_features].
        pattern: N and M.
        permutation: shared with the other linears of the group.
        group: channels of a grid; divides in_features.
        sparse: whether the mask of the pattern comes before the rounding.
    """

    def __init__(
        self,
        linear: nn.Linear,
        scores: Scores,
        pattern: Pattern,
        permutation: StepPermutation,
        *,
        group: int,
        sparse: bool,
    ) -> None:
        super().__init__(linear, scores, pattern, permutation)
        self.group, self.sparse = group, sparse

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features]."""
        output = _RoundedProduct.apply(
            inputs,
            self.permutation.matrix(),
            self.weight,
            self.importance() if self.sparse else None,
            self.permutation.order,
            self.pattern,
            self.group,
        )
        return output if self.bias is None else output + self.bias


class _RoundedProduct(torch.autograd.Function):
    """x @ rounded(W * mask)^T, differentiable in x and in the permutation matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        matrix: Tensor | None,
        weight: Tensor,
        importance: Tensor | None,
        order: Tensor,
        pattern: Pattern,
        group: int,
    ) -> Tensor:
        permuted, mask = weight.index_select(0, order), None
        if importance is not None:
            mask = keep_channels(importance.index_select(0, order), pattern).view(torch.uint8)
            permuted = permuted * mask
        grouped = permuted.float().unflatten(0, (-1, group))
        step = grid_steps(grouped)
        units = grouped / step
        nearest = units.round()
        off = (nearest - units).flatten(0, 1).to(weight.dtype)
        rounded = (nearest * step).flatten(0, 1).to(weight.dtype)
        rounded = rounded.index_select(0, order.argsort())
        ctx.save_for_backward(inputs, rounded, mask, permuted, off)
        ctx.constants = weight, importance, order, pattern, group
        ctx.shape = None if matrix is None else matrix.shape
        return inputs @ rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, rounded, mask, permuted, off = ctx.saved_tensors
        weight, importance, order, pattern, group = ctx.constants
        input_gradient = gradient @ rounded.t() if ctx.needs_input_grad[0] else None
        matrix = None
        if ctx.needs_input_grad[1]:
            weight_gradient = inputs.flatten(0, -2).t() @ gradient.flatten(0, -2)
            in_order = weight_gradient.index_select(0, order)
            step_gradient = (in_order * off).float().unflatten(0, (-1, group))
            matrix = _through_steps(weight, permuted, step_gradient, order, ctx.shape)
            if mask is not None:
                mask_gradient = weight_gradient * weight
                matrix += matrix_gradient(
                    mask_gradient, importance, mask, order, pattern, ctx.shape[1]
                )
        return input_gradient, matrix, None, None, None, None, None


def grid_steps(grouped: Tensor) -> Tensor:
    """Step of each grid: float32 [groups, channels, out_features] -> [groups, 1, out_features]."""
    largest = grouped.abs().amax(1, keepdim=True)
    return largest.clamp_min(torch.finfo(torch.float32).tiny) / LARGEST_INT4


def _through_steps(
    weight: Tensor, permuted: Tensor, step_gradient: Tensor, order: Tensor, shape: torch.Size
) -> Tensor:
    """Gradient of the block-diagonal permutation matrix through the steps of the grids.

    With A the magnitudes and T = steps(A P) P^T the step of each weight, as for the mask:
    dP = A^T d(A P) + dT^T steps(A P).

    Args:
        weight: [in_features, out_features], original order.
        permuted: the same in the order of the positions, pruned weights zero.
        step_gradient: float32 [groups, channels, out_features], of each weight's step.
        order: int64 [in_features], position -> channel.
        shape: of the matrices of all blocks.
    """
    blocks = shape[0]
    grouped = permuted.float().abs().unflatten(0, step_gradient.shape[:2])
    step = grid_steps(grouped).expand_as(grouped)
    share = (grouped / grouped.mean().clamp_min(1e-30)).softmax(dim=1) / LARGEST_INT4
    magnitude_gradient = share * step_gradient.sum(1, keepdim=True)

    def by_block(tensor: Tensor) -> Tensor:
        return tensor.to(weight.dtype).reshape(blocks, shape[1], -1)

    in_channels = step_gradient.flatten(0, 1).index_select(0, order.argsort())
    through_magnitude = by_block(weight.abs()) @ by_block(magnitude_gradient).mT
    return (through_magnitude + by_block(in_channels) @ by_block(step).mT).float()
