import pytest
import torch
from torch.nn import functional

from permllm_offline.text import sampled_text
from permllm_offline.text.sampled_text import sample_text
from tests.offline.tiny_models import tiny_llama, tiny_model


def test_windows_have_their_shape_and_follow_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sampled_text, "PIECE", 10)
    model = tiny_llama()
    windows = sample_text(model, 3, 24, seed=1)
    assert windows.shape == (3, 24)
    assert windows.dtype == torch.long
    assert torch.equal(windows, sample_text(model, 3, 24, seed=1))
    assert not torch.equal(windows, sample_text(model, 3, 24, seed=2))


def test_tokens_follow_the_distribution_of_the_model() -> None:
    """The mean log-likelihood of what was sampled is minus the mean entropy, within its error."""
    model = tiny_llama()
    windows = sample_text(model, 64, 12, seed=0)
    with torch.no_grad():
        log_probabilities = model(windows).logits[:, :-1].log_softmax(-1)
    taken = -functional.nll_loss(
        log_probabilities.flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    )
    expected = (log_probabilities.exp() * log_probabilities).sum(-1).flatten()
    difference = taken - expected
    error = float(difference.std()) / len(difference) ** 0.5
    assert abs(float(difference.mean())) < 4 * error
    uniform = -torch.log(torch.tensor(64.0))
    assert float(expected.mean()) > float(uniform) + 8 * error


def test_pieces_begin_with_any_token() -> None:
    first = sample_text(tiny_llama(), 64 * 8, 1, seed=0).flatten()
    assert len(first.unique()) > 55


def test_pieces_and_windows_of_gemma_begin_with_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_text, "PIECE", 10)
    model = tiny_model("gemma3_text", bos_token_id=5)
    windows = sample_text(model, 2, 15, seed=1)
    assert windows[:, 0].tolist() == [5, 5]
    assert windows[0, 10] == 5
