"""The dense loop computes what explicit matrices say, and masks as this project's loop does."""

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from benchmarks.pruning.dense_permutations import (
    DenseMaskedLinear,
    DensePermutation,
    SharedMatrix,
    epoch_temperature,
    sequence_norm,
)
from benchmarks.pruning.layer_step import PATTERN
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation

BLOCK, BLOCKS, OUT = 8, 2, 6
CHANNELS = BLOCK * BLOCKS


class Layer:
    """One linear in double precision under a dense permutation of two blocks."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.permutation = DensePermutation(CHANNELS, BLOCK, generator).double()
        with torch.no_grad():
            self.permutation.weight[0, 0, :2] = torch.tensor([0.8, -0.9])  # beyond the clamp
        self.permutation.temperature = 0.5
        self.linear = nn.Linear(CHANNELS, OUT, bias=False).double().requires_grad_(False)
        shape = self.linear.weight.shape
        self.linear.weight.copy_(torch.randn(shape, generator=generator))
        # Of scores as large as these the soft mask is far from the hard one and from even.
        self.scores = 3 * torch.rand(shape, generator=generator, dtype=torch.double)
        self.inputs = torch.randn(3, CHANNELS, generator=generator, dtype=torch.double)
        self.upstream = torch.randn(3, OUT, generator=generator, dtype=torch.double)

    def output(self) -> Tensor:
        shared = SharedMatrix(self.permutation)
        return DenseMaskedLinear(self.linear, self.scores, PATTERN, shared)(self.inputs)


def soft_blocks(logits: Tensor, temperature: float) -> Tensor:
    """Sinkhorn's matrices of [blocks, rows, columns], written out."""
    found = torch.exp(logits / temperature)
    found = found / found.sum(2, keepdim=True)
    for _ in range(5):
        found = found / found.sum(2, keepdim=True)
        found = found / found.sum(1, keepdim=True)
    return found


def hard_matrix(soft: Tensor) -> Tensor:
    matrix = torch.zeros(CHANNELS, CHANNELS, dtype=torch.double)
    for block, scores in enumerate(soft):
        for row, column in zip(*linear_sum_assignment(-scores.numpy()), strict=True):
            matrix[block * BLOCK + row, block * BLOCK + column] = 1.0
    return matrix


def hard_mask(scores: Tensor) -> Tensor:
    """Two of every four consecutive columns, row by row."""
    mask = torch.zeros_like(scores)
    for row in range(OUT):
        for start in range(0, CHANNELS, 4):
            group = scores[row, start : start + 4].tolist()
            for column in sorted(range(4), key=lambda index: -group[index])[:2]:
                mask[row, start + column] = 1.0
    return mask


def test_output_and_gradients_are_those_of_explicit_matrices() -> None:
    layer = Layer()
    permutation, weight = layer.permutation, layer.linear.weight
    found = layer.output()
    found.backward(layer.upstream)

    clamped = (permutation.weight * permutation.scale).detach().clamp(-1, 1).requires_grad_()
    assert int((clamped.abs() == 1).sum()) >= 2
    soft = soft_blocks(clamped, 0.5)
    matrix = hard_matrix(soft.detach()).requires_grad_()
    mask = hard_mask(layer.scores @ matrix.detach()) @ matrix.detach().t()
    torch.testing.assert_close(found, layer.inputs @ (weight * mask).t())

    # The gradient of the mask is fixed by the hard forward pass; from there on all is soft:
    # mask = softmax(S P) P^T at the hard P, and P moves as the soft matrix does.
    mask_gradient = (layer.upstream.t() @ layer.inputs) * weight
    grouped = (layer.scores @ matrix).unflatten(1, (-1, 4))
    exponentials = grouped.exp()
    soft_mask = (exponentials / exponentials.sum(-1, keepdim=True)).flatten(1) @ matrix.t()
    (matrix_gradient,) = torch.autograd.grad((soft_mask * mask_gradient).sum(), matrix)
    blocks = [slice(start, start + BLOCK) for start in range(0, CHANNELS, BLOCK)]
    by_block = torch.stack([matrix_gradient[block, block] for block in blocks])
    (logits,) = torch.autograd.grad((soft * by_block).sum(), clamped)  # the clamp is passed

    assert permutation.weight.grad is not None
    assert permutation.scale.grad is not None
    scale, start = permutation.scale.detach(), permutation.weight.detach()
    torch.testing.assert_close(permutation.weight.grad, logits * scale)
    torch.testing.assert_close(permutation.scale.grad, (logits * start).sum())
    assert permutation.weight.grad.abs().max() > 1e-3


def test_the_output_is_that_of_the_gathers_under_the_same_permutation() -> None:
    layer = Layer()
    matrix = layer.permutation().detach()
    step = StepPermutation(matrix.argmax(0), torch.arange(BLOCKS))
    theirs = layer.output()
    ours = PermutedMaskedLinear(layer.linear, layer.scores, PATTERN, step)(layer.inputs)
    torch.testing.assert_close(theirs, ours)


def test_masks_are_exact_in_bfloat16() -> None:
    generator = torch.Generator().manual_seed(0)
    permutation = DensePermutation(CHANNELS, BLOCK, generator).to(torch.bfloat16)
    linear = nn.Linear(CHANNELS, OUT, bias=False).requires_grad_(False).to(torch.bfloat16)
    scores = 3 * torch.rand(linear.weight.shape, generator=generator)
    mask = DenseMaskedLinear(linear, scores, PATTERN, SharedMatrix(permutation)).mask()
    assert mask.dtype == torch.bfloat16
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum(1).tolist() == [CHANNELS / 2] * OUT


def test_the_temperature_moves_by_epoch() -> None:
    assert epoch_temperature(0, 50) == 1.0
    assert epoch_temperature(49, 50) == pytest.approx(0.118)


def test_a_norm_counts_sequences_instead_of_tokens() -> None:
    inputs = torch.randn(4, 512, 3, generator=torch.Generator().manual_seed(0))
    over_tokens = inputs.square().mean(dim=(0, 1)).sqrt()
    by_sequence = sum(sequence.norm(dim=0) ** 2 for sequence in inputs) / 4
    torch.testing.assert_close(sequence_norm(over_tokens, 512), by_sequence**0.5)
