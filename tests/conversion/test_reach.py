import torch
from torch import Tensor

from permllm_offline.conversion.reach import Reach
from permllm_vllm.checkpoint.pattern import Pattern

TWO_OF_FOUR = Pattern(2, 4)


def sparse_rows(channels: int, spread: int) -> Tensor:
    """Two of every four kept, the channels of a group ``spread`` apart."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand((2 * channels, channels), generator=generator)
    groups = scores.unflatten(1, (-1, 4, spread)).transpose(2, 3)
    kept = groups >= groups.topk(2, dim=-1).values.min(-1, keepdim=True).values
    return kept.transpose(2, 3).flatten(1)


def test_finds_the_block_that_holds_whole_groups() -> None:
    assert Reach().smallest_block("first", sparse_rows(256, 16), TWO_OF_FOUR) == 64
    assert Reach().smallest_block("first", sparse_rows(256, 64), TWO_OF_FOUR) == 256


def test_says_nothing_of_a_group_that_it_has_not_looked_at() -> None:
    reach = Reach()
    assert reach.smallest_block("first", sparse_rows(256, 16), TWO_OF_FOUR) == 64
    assert reach.smallest_block("second", torch.rand(256, 128) < 0.5, TWO_OF_FOUR) is None
    assert reach.smallest_block("first", sparse_rows(256, 16), TWO_OF_FOUR) == 64
