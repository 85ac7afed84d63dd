"""What is recorded of the calls of decoder layers, and what is carried from one to the next."""

import pytest
import torch

from permllm_offline.model.decoder_calls import record_calls
from permllm_offline.model.lookup import family_of
from tests.offline.tiny_models import tiny_model


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
