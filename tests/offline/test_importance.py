import pytest
import torch

from permllm_offline.activations import collect, last_hidden_state
from permllm_offline.families import FAMILIES
from permllm_offline.importance import magnitude, wanda
from tests.offline.tiny_models import tiny_llama


def test_magnitude() -> None:
    assert magnitude(torch.tensor([[-2.0, 1.0]]), None).tolist() == [[2.0, 1.0]]


def test_wanda_multiplies_by_the_norm_of_the_input_channel() -> None:
    scores = wanda(torch.tensor([[-2.0, 1.0], [3.0, -1.0]]), torch.tensor([1.0, 10.0]))
    assert scores.tolist() == [[2.0, 10.0], [3.0, 10.0]]


def test_wanda_without_activations_is_refused() -> None:
    with pytest.raises(ValueError, match="activation norms"):
        wanda(torch.ones(1, 4), None)


def test_norms_are_the_root_mean_square_of_each_input_channel() -> None:
    model, family = tiny_llama(), FAMILIES["llama"]
    windows = torch.randint(0, 64, (3, 16), generator=torch.Generator().manual_seed(0))
    statistics = collect(model, family, windows, hidden_states=True)
    states = model.model(windows, output_hidden_states=True).hidden_states
    first_norm = model.model.layers[0].input_layernorm(states[0])
    expected = first_norm.flatten(0, 1).square().mean(0).sqrt()
    torch.testing.assert_close(statistics.norms[0]["qkv"], expected, rtol=1e-4, atol=1e-5)
    assert set(statistics.norms[1]) == {"qkv", "o", "gate_up", "down"}
    assert statistics.norms[1]["down"].shape == (192,)
    assert statistics.hidden_states is not None
    target = last_hidden_state(model, family, windows)
    torch.testing.assert_close(statistics.hidden_states, target, rtol=1e-4, atol=1e-5)
    # The state before the final norm, not after it.
    torch.testing.assert_close(
        model.lm_head(model.model.norm(target)), model(windows).logits, rtol=1e-4, atol=1e-4
    )
