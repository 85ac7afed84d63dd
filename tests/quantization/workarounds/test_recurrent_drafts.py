"""Recurrent states on CPUs: no drafts."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from permllm_vllm.vllm_workarounds.recurrent_drafts import refuse_drafts


class Recurrent(torch.nn.Module):
    """As far as it is asked."""

    def get_state_shape(self) -> None: ...

    def get_kv_cache_spec(self) -> None: ...


@pytest.mark.skipif(torch.cuda.is_available(), reason="beside a GPU there is Triton")
def test_vllm_still_has_no_kernel_for_it() -> None:
    """Once this fails, vLLM may draft there: try it without `vllm_workarounds/recurrent_drafts.py`.

    Without Triton a kernel is the plain function, which no grid launches.
    """
    from vllm.v1.worker.mamba_utils import precopy_mamba_align_fused_kernel

    assert not hasattr(precopy_mamba_align_fused_kernel, "__getitem__")


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
