import pytest
import torch
from torch.nn import functional

from permllm_offline.reconstruction.divergence import TOKENS_AT_ONCE, divergence


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tokens", [1, TOKENS_AT_ONCE, 2 * TOKENS_AT_ONCE + 3])
def test_value_and_gradient_are_those_of_whole_logits(tokens: int, softcap: float | None) -> None:
    def logits(state: torch.Tensor) -> torch.Tensor:
        whole = state @ head.t()
        return whole if softcap is None else softcap * torch.tanh(whole / softcap)

    torch.manual_seed(0)
    student = torch.randn(tokens, 8, requires_grad=True)
    teacher, head = torch.randn(tokens, 8), torch.randn(50, 8)
    loss = divergence(student, teacher, head, softcap)
    (gradient,) = torch.autograd.grad(3 * loss, student)
    expected = functional.kl_div(
        logits(student).log_softmax(-1), logits(teacher).softmax(-1), reduction="sum"
    )
    (expected_gradient,) = torch.autograd.grad(3 * expected, student)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-5)


def test_equal_heads_have_no_divergence_and_no_gradient() -> None:
    state = torch.randn(5, 8, requires_grad=True)
    loss = divergence(state, state.detach(), torch.randn(50, 8))
    loss.backward()
    assert abs(loss.item()) < 1e-5
    assert state.grad is not None
    assert float(state.grad.abs().max()) < 1e-5


def test_large_logits_stay_finite() -> None:
    student = torch.full((3, 4), 100.0, requires_grad=True)
    loss = divergence(student, -student.detach(), 100 * torch.eye(4).repeat(3, 1))
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
