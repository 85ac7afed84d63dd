"""How much of a linear a source keeps."""

import torch

from permllm_offline.conversion.channel_order import share_of_kept


def test_of_a_linear_without_weights_nothing_is_kept() -> None:
    assert share_of_kept(torch.ones(0, 8, dtype=torch.bool)) == 0


def test_one_weight_more_than_half_shows_in_a_large_linear() -> None:
    """2 ** 24 + 1 is the first whole number that float32 does not have."""
    kept = torch.tensor([True, False]).repeat(2**12, 2**12)
    assert share_of_kept(kept) == 0.5
    kept[-1, -1] = True
    assert share_of_kept(kept) == 0.5 + 2**-25
    kept[:2, 0] = False
    assert share_of_kept(kept) == 0.5 - 2**-25
