import pytest
import torch
from torch import Tensor, nn

from permllm_offline.permutation import masked_linear
from permllm_offline.permutation.masked_linear import PermutedMaskedLinear, StepPermutation
from permllm_offline.sparsity.importance import wanda
from permllm_vllm.checkpoint.pattern import Pattern

BLOCK, BLOCKS = 16, 3


def dense_oracle(
    inputs: Tensor, weight: Tensor, importance: Tensor, matrix: Tensor, pattern: Pattern
) -> Tensor:
    """The paper with a dense C x C matrix and plain autograd: W * (mask(S P) P^T)."""
    dense = torch.block_diag(*matrix)
    scores = importance @ dense
    groups = scores.unflatten(1, (-1, pattern.group))
    soft = groups.softmax(dim=2)
    kept = groups.topk(pattern.kept, dim=2).indices
    hard = torch.zeros_like(soft).scatter(2, kept, 1.0)
    mask = ((hard - soft).detach() + soft).flatten(1)
    return inputs @ (weight * (mask @ dense.t())).t()


@pytest.mark.parametrize("pattern", [Pattern(2, 4), Pattern(4, 8)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("blocks_at_once", [BLOCKS, 2, 1])
def test_value_and_gradients_equal_the_dense_matrix(
    monkeypatch: pytest.MonkeyPatch, pattern: Pattern, with_bias: bool, blocks_at_once: int
) -> None:
    monkeypatch.setattr(masked_linear, "PART_ELEMENTS", blocks_at_once * BLOCK * 24)
    generator = torch.Generator().manual_seed(0)
    channels = BLOCK * BLOCKS
    linear = nn.Linear(channels, 24, bias=with_bias).double().requires_grad_(False)
    weight = linear.weight.detach().clone()
    importance = torch.rand(24, channels, generator=generator, dtype=torch.double)
    order = torch.stack([torch.randperm(BLOCK, generator=generator) for _ in range(BLOCKS)])
    matrix = nn.functional.one_hot(order).transpose(1, 2).double()
    starts = torch.arange(BLOCKS)[:, None] * BLOCK
    inputs = torch.randn(2, 5, channels, generator=generator, dtype=torch.double)

    ours_inputs, ours_matrix = inputs.clone().requires_grad_(), matrix.clone().requires_grad_()
    step = StepPermutation((order + starts).flatten(), torch.arange(BLOCKS), ours_matrix)
    module = PermutedMaskedLinear(linear, importance, pattern, step)
    ours = module(ours_inputs)

    their_inputs, their_matrix = inputs.clone().requires_grad_(), matrix.clone().requires_grad_()
    normalised = importance / importance.mean()
    theirs = dense_oracle(their_inputs, weight, normalised, their_matrix, pattern)
    if with_bias:
        theirs = theirs + linear.bias
    torch.testing.assert_close(ours, theirs)

    upstream = torch.randn(ours.shape, generator=generator, dtype=torch.double)
    ours.backward(upstream)
    theirs.backward(upstream)
    torch.testing.assert_close(ours_inputs.grad, their_inputs.grad)
    torch.testing.assert_close(ours_matrix.grad, their_matrix.grad, check_dtype=False)


def test_the_original_layer_keeps_its_weight() -> None:
    linear = nn.Linear(16, 8).requires_grad_(False)
    before = linear.weight.clone()
    step = StepPermutation(torch.arange(16), torch.zeros(1).long())
    PermutedMaskedLinear(linear, torch.rand(8, 16), Pattern(2, 4), step)
    assert torch.equal(linear.weight, before)


def test_nothing_but_weight_and_bits_is_kept() -> None:
    linear = nn.Linear(64, 32, bias=False).requires_grad_(False)
    step = StepPermutation(torch.arange(64), torch.arange(4))
    module = PermutedMaskedLinear(linear, wanda(linear.weight, torch.rand(64)), Pattern(2, 4), step)
    saved: list[Tensor] = []
    inputs = torch.randn(3, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: None):
        module(inputs)
    assert [kept.shape for kept in saved] == [inputs.shape]
    assert module.mask_bits().numel() == linear.weight.numel() // 8
    assert linear.weight.data_ptr() == module.weight.data_ptr()


def test_the_mask_is_chosen_once_for_an_order() -> None:
    linear = nn.Linear(32, 8, bias=False).requires_grad_(False)
    step = StepPermutation(torch.arange(32), torch.arange(2))
    module = PermutedMaskedLinear(linear, wanda(linear.weight, torch.rand(32)), Pattern(2, 4), step)
    inputs = torch.randn(2, 32)
    first, bits = module(inputs), module.mask_bits()
    assert torch.equal(module(inputs), first)
    assert module.mask_bits() is bits
    step.order = torch.cat([torch.randperm(16), 16 + torch.randperm(16)])
    assert not torch.equal(module(inputs), first)


def test_gradients_of_tied_blocks_are_added_in_their_order() -> None:
    """As many threads as share a gradient must not decide in which order its sum is made."""
    ties = torch.arange(4).repeat_interleave(5)
    size = 64
    generator = torch.Generator().manual_seed(0)
    gradients = torch.randn((len(ties), size, size), generator=generator) * 10.0 ** torch.arange(
        len(ties)
    ).remainder(5).sub(2).view(-1, 1, 1)
    expected = torch.zeros(4, size, size)
    for block, tie in enumerate(ties.tolist()):
        expected[tie] += gradients[block]
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in range(20):
            soft = torch.zeros((4, size, size), requires_grad=True)
            matrix = StepPermutation(torch.arange(len(ties) * size), ties, soft).matrix()
            assert matrix is not None
            matrix.backward(gradients)
            assert soft.grad is not None
            assert torch.equal(soft.grad, expected)
    finally:
        torch.set_num_threads(threads)
