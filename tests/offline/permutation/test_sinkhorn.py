import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from permllm_offline.permutation.hardening import harden
from permllm_offline.permutation.sinkhorn import sinkhorn


def plain_sinkhorn(logits: np.ndarray, temperature: float, iterations: int) -> np.ndarray:
    soft = np.exp(logits / temperature)
    for _ in range(iterations):
        for row in range(len(soft)):
            soft[row] /= soft[row].sum()
        for column in range(len(soft)):
            soft[:, column] /= soft[:, column].sum()
    return soft


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("iterations", [1, 5])
def test_equals_a_plain_loop(temperature: float, iterations: int) -> None:
    logits = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.double)
    soft = sinkhorn(logits, temperature, iterations)
    for block in range(3):
        expected = plain_sinkhorn(logits[block].numpy(), temperature, iterations)
        np.testing.assert_allclose(soft[block].numpy(), expected, rtol=1e-9)


def test_without_iterations_rows_sum_to_one() -> None:
    soft = sinkhorn(torch.randn(2, 8, 8), 1.0, 0)
    torch.testing.assert_close(soft.sum(-1), torch.ones(2, 8))


def test_becomes_doubly_stochastic() -> None:
    soft = sinkhorn(torch.randn(4, 16, 16), 1.0, 50)
    torch.testing.assert_close(soft.sum(-1), torch.ones(4, 16))
    torch.testing.assert_close(soft.sum(-2), torch.ones(4, 16))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**31), st.floats(0, 4), st.sampled_from([0.1, 1.0]), st.sampled_from([0, 1, 5])
)
def test_large_logits_give_no_nan(
    seed: int, exponent: float, temperature: float, iterations: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.rand(2, 16, 16, generator=generator) - 1) * 10**exponent
    logits.requires_grad_()
    soft = sinkhorn(logits, temperature, iterations)
    (soft * torch.randn(soft.shape, generator=generator)).sum().backward()
    assert soft.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert torch.equal(harden(soft).sort(dim=1).values, torch.arange(16).expand(2, -1))
