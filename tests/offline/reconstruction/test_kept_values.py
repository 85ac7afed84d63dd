import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permllm_offline.reconstruction.kept_values import (
    add_kept,
    gather_kept,
    kept_channels,
    scatter_kept,
)
from permllm_offline.sparsity import importance
from permllm_vllm.checkpoint.packing import pack_mask


@given(
    rows=st.integers(1, 9),
    eights=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**32),
)
def test_kept_weights_are_taken_and_put_back(
    rows: int, eights: int, dtype: torch.dtype, seed: int
) -> None:
    channels = 8 * eights
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, channels, generator=generator).to(dtype)
    order = torch.rand(rows, channels, generator=generator).argsort(1)
    mask = torch.zeros(rows, channels, dtype=torch.bool)
    mask.scatter_(1, order[:, : channels // 2], True)
    rebuilt = torch.zeros_like(weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(importance, "CHUNK_ELEMENTS", 2 * channels)  # two rows at once
        for places in (mask, ~mask):
            found = kept_channels(pack_mask(places))
            assert torch.equal(found.long(), places.nonzero()[:, 1].view(rows, -1))
            kept = torch.empty(found.shape)
            gather_kept(weight, found, kept)
            assert torch.equal(kept.flatten(), weight[places].float())
            scatter_kept(kept, found, rebuilt)
            add_kept(weight, found, kept)
            assert torch.equal(kept.flatten(), 2 * weight[places].float())
        assert torch.equal(rebuilt, weight)


@pytest.mark.parametrize("channels", [1 << 15, (1 << 15) + 8])
def test_the_last_channel_of_a_long_row_has_its_number(channels: int) -> None:
    mask = torch.zeros(1, channels, dtype=torch.bool)
    mask[0, -1] = True
    assert kept_channels(pack_mask(mask)).tolist() == [[channels - 1]]
