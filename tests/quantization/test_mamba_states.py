"""Recurrent states on CPUs: no drafts, and no states from within a prompt."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm.v1.kv_cache_interface import MambaSpec

from permllm_vllm.quantization.mamba_states import refuse_drafts, split_prompts_at_blocks


class Recurrent(torch.nn.Module):
    """As far as it is asked."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.settings = settings

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        return ((2, 3),)

    def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
        shapes, dtypes = self.get_state_shape(), (torch.float32,)
        return MambaSpec(block_size=16, shapes=shapes, dtypes=dtypes, **self.settings)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("drafts", [False, True])
def test_drafts(recurrent: bool, drafts: bool) -> None:
    model = torch.nn.ModuleList([Recurrent() if recurrent else torch.nn.Linear(2, 2)])
    config = SimpleNamespace(speculative_config=SimpleNamespace() if drafts else None)
    if recurrent and drafts:
        with pytest.raises(NotImplementedError, match="takes back no rejected tokens on a CPU"):
            refuse_drafts(model, config)
    else:
        refuse_drafts(model, config)


def test_no_state_is_kept_within_a_prompt() -> None:
    asking = Recurrent(num_prefill_checkpoint_blocks=1, prefill_checkpoint_alignment=1)
    plain = Recurrent()
    expected = plain.get_kv_cache_spec(None)
    split_prompts_at_blocks(torch.nn.ModuleList([asking, plain, torch.nn.Linear(2, 2)]))
    assert asking.get_kv_cache_spec(None) == plain.get_kv_cache_spec(None) == expected
