"""What is recorded of the calls of decoder layers, and what is carried from one to the next."""

import pytest
import torch

from permllm_offline.model.decoder_calls import record_calls, run_windows
from permllm_offline.model.lookup import family_of
from tests.offline.tiny_models import tiny_model


def test_values_that_no_layer_shares_are_not_carried() -> None:
    """Those of the last layers are handed on for drafts alone, which no text here passes."""
    tokens = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(1))
    for sharing in (0, 2):
        model = tiny_model("gemma4_text", num_kv_shared_layers=sharing)
        family = family_of(model.config)
        assert family.read_by_others == ({2, 3} if sharing == 0 else {0, 1})
        calls = record_calls(model, family, tokens)
        states = calls.states
        for layer, call in zip(model.model.layers, calls.layers, strict=True):
            states = run_windows(layer, states, call)
        assert len(states.handed_on) == sharing


def test_states_of_the_first_layer_alone_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each copy to the CPU is as large as all windows."""
    tokens = torch.randint(0, 64, (3, 24), generator=torch.Generator().manual_seed(1))
    model, copied = tiny_model("llama"), []
    original = torch.Tensor.cpu

    def counting(tensor: torch.Tensor) -> torch.Tensor:
        copied.append(tensor.shape)
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "cpu", counting)
    record_calls(model, family_of(model.config), tokens)
    assert copied == [(1, 24, 128)] * 3
