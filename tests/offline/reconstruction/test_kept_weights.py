import torch
from torch import Tensor, nn

from permllm_offline.reconstruction.kept_weights import BETAS, EPSILON, KeptWeights


def pruned_linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    torch.manual_seed(0)
    linear = nn.Linear(8, 6, bias=False, dtype=dtype).requires_grad_(False)
    mask = torch.rand(6, 8) < 0.5
    linear.weight.mul_(mask)
    return linear, mask


def test_steps_are_those_of_adam_and_pruned_weights_stay_zero() -> None:
    linear, mask = pruned_linear()
    weight, inputs = linear.weight.clone(), torch.randn(10, 8)
    first = second = torch.zeros(6, 8)
    with KeptWeights([linear], [mask]) as kept:
        for step in range(1, 5):
            linear(inputs).square().sum().backward()
            gradient = (2 * (inputs @ weight.t()).t() @ inputs) * mask
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            scaled = first / (1 - BETAS[0] ** step)
            scaled = scaled / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
            weight = weight - 0.01 * step * scaled
            kept.step(0.01 * step)
            assert linear.weight.grad is None
            torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-4, atol=1e-6)
            assert not linear.weight[~mask].any()
    assert not linear.weight.requires_grad


def test_steps_below_the_spacing_of_bfloat16_add_up() -> None:
    linear, mask = pruned_linear(torch.bfloat16)
    before = linear.weight.clone()
    with KeptWeights([linear], [mask]) as kept:
        for _ in range(200):
            linear.weight.sum().backward()
            kept.step(1e-4)
    moved = (before - linear.weight)[mask].float()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=0.2, atol=0)


def test_a_linear_without_gradient_stays() -> None:
    (used, mask), (unused, other) = pruned_linear(), pruned_linear()
    before = unused.weight.clone()
    with KeptWeights([used, unused], [mask, other]) as kept:
        used.weight.sum().backward()
        kept.step(0.1)
    assert torch.equal(unused.weight, before)
    assert not torch.equal(used.weight, before)


def test_a_snapshot_comes_back_and_nothing_is_left_to_train() -> None:
    linear, mask = pruned_linear()
    before = linear.weight.clone()
    with KeptWeights([linear], [mask]) as kept:
        saved = kept.snapshot()
        linear.weight.sum().backward()
        kept.step(0.1)
        assert not torch.equal(linear.weight, before)
        kept.load(saved)
        assert torch.equal(linear.weight, before)
        linear.weight.sum().backward()
    assert not linear.weight.requires_grad
    assert linear.weight.grad is None
