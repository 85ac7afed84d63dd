import pytest
import torch
from torch import Tensor, nn

from permllm_offline.reconstruction import kept_weights
from permllm_offline.reconstruction.kept_weights import BETAS, EPSILON, KeptWeights
from permllm_offline.sparsity.int4_values import choose_grid
from permllm_offline.sparsity.mask import keep_channels
from permllm_vllm.checkpoint.packing import pack_mask
from permllm_vllm.checkpoint.pattern import Pattern


def pruned_linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Linear, Tensor]:
    """A linear with 2:4 zeros, and its mask."""
    torch.manual_seed(0)
    linear = nn.Linear(16, 6, bias=False, dtype=dtype).requires_grad_(False)
    mask = keep_channels(torch.rand(16, 6), Pattern(2, 4)).t().contiguous()
    linear.weight.mul_(mask)
    return linear, mask


def test_steps_are_those_of_adam_and_pruned_weights_stay_zero() -> None:
    linear, mask = pruned_linear()
    weight, inputs = linear.weight.clone(), torch.randn(10, 16)
    first = second = torch.zeros(6, 16)
    with KeptWeights([linear], [pack_mask(mask)]) as kept:
        for step in range(1, 5):
            for window in (inputs[:3], inputs[3:]):  # their gradients add up
                linear(window).square().sum().backward()
                assert linear.weight.grad is None
            gradient = (2 * (inputs @ weight.t()).t() @ inputs) * mask
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            scaled = first / (1 - BETAS[0] ** step)
            scaled = scaled / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
            weight = weight - 0.01 * step * scaled
            kept.step(0.01 * step)
            torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-4, atol=1e-6)
            assert not linear.weight[~mask].any()
    assert not linear.weight.requires_grad


def test_steps_below_the_spacing_of_bfloat16_add_up() -> None:
    linear, mask = pruned_linear(torch.bfloat16)
    before = linear.weight.clone()
    with KeptWeights([linear], [pack_mask(mask)]) as kept:
        for _ in range(200):
            linear.weight.sum().backward()
            kept.step(1e-4)
    moved = (before - linear.weight)[mask].float()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.02), rtol=0.2, atol=0)


def test_the_model_holds_values_of_the_grid_and_steps_go_past_it() -> None:
    """Straight-through: gradients are those at the rounded weights, steps those of exact ones."""
    linear, mask = pruned_linear()
    exact, inputs = linear.weight.clone(), torch.randn(10, 16)
    grid = choose_grid(linear.weight, torch.ones(16))

    def rounded(weight: Tensor) -> Tensor:
        return grid.integers(weight) * grid.scale[:, None]

    first = second = torch.zeros(6, 16)
    with KeptWeights([linear], [pack_mask(mask)], grids=[grid]) as kept:
        for step in range(1, 5):
            torch.testing.assert_close(linear.weight.detach(), rounded(exact), rtol=1e-6, atol=0)
            held = linear.weight.detach().clone()
            linear(inputs).square().sum().backward()
            gradient = (2 * (inputs @ held.t()).t() @ inputs) * mask
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            scaled = first / (1 - BETAS[0] ** step)
            scaled = scaled / ((second / (1 - BETAS[1] ** step)).sqrt() + EPSILON)
            exact = exact - 0.01 * scaled
            kept.step(0.01)
        kept.remember()
        kept.step(0.0)
        kept.recall()
    assert torch.equal(grid.integers(linear.weight) * grid.scale[:, None], linear.weight.detach())
    assert not linear.weight[~mask].any()


def test_a_linear_without_gradient_stays() -> None:
    (used, mask), (unused, other) = pruned_linear(), pruned_linear()
    before = unused.weight.clone()
    with KeptWeights([used, unused], [pack_mask(mask), pack_mask(other)]) as kept:
        used.weight.sum().backward()
        kept.step(0.1)
    assert torch.equal(unused.weight, before)
    assert not torch.equal(used.weight, before)


def test_a_backward_pass_that_fails_leaves_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, mask = pruned_linear()

    def fail(*_: Tensor) -> None:
        raise OSError("the disk is gone")

    def tune() -> None:
        with KeptWeights([linear], [pack_mask(mask)]):
            monkeypatch.setattr(kept_weights, "gather_kept", fail)
            linear.weight.sum().backward()

    with pytest.raises(OSError, match="is gone"):
        tune()
    assert linear.weight.grad is None
    assert not linear.weight.requires_grad


def test_a_gradient_is_used_once() -> None:
    linear, mask = pruned_linear()
    with KeptWeights([linear], [pack_mask(mask)]) as kept:
        linear.weight.sum().backward()
        kept.step(0.1)
        moved = linear.weight.clone()
        kept.step(0.1)
    assert torch.equal(linear.weight, moved)


def test_what_is_remembered_comes_back_and_nothing_is_left_to_train() -> None:
    linear, mask = pruned_linear(torch.bfloat16)
    before = linear.weight.clone()
    with KeptWeights([linear], [pack_mask(mask)]) as kept:
        kept.remember()
        linear.weight.sum().backward()
        kept.step(0.1)
        assert not torch.equal(linear.weight, before)
        kept.recall()
        assert torch.equal(linear.weight, before)
        linear.weight.sum().backward()
    assert not linear.weight.requires_grad
    assert linear.weight.grad is None
    assert linear(torch.ones(16, dtype=torch.bfloat16)).grad_fn is None


def test_a_state_goes_on_as_if_nothing_had_happened() -> None:
    inputs = torch.randn(10, 16)

    def tune(kept: KeptWeights, linear: nn.Linear, steps: int) -> None:
        for _ in range(steps):
            linear(inputs).square().sum().backward()
            kept.step(0.01)

    (whole, mask), (resumed, _) = pruned_linear(), pruned_linear()
    with KeptWeights([whole], [pack_mask(mask)]) as kept:
        tune(kept, whole, 2)
        kept.remember()
        state = {name: tensor.clone() for name, tensor in kept.state().items()}
        best = whole.weight.clone()
        tune(kept, whole, 2)
    with KeptWeights([resumed], [pack_mask(mask)]) as kept:
        kept.load_state(state)
        tune(kept, resumed, 2)
        assert torch.equal(whole.weight, resumed.weight)
        kept.recall()
        assert torch.equal(resumed.weight, best)
