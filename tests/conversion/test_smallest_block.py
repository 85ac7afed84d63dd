import pytest
import torch
from torch import Tensor

from permllm_offline.conversion.recovery import recover_permutation
from permllm_offline.conversion.smallest_block import BlockSearch
from permllm_vllm.checkpoint.pattern import Pattern
from tests.conversion.test_recovery import PATTERNS, kept_of, random_order


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_how_far_channels_were_moved(pattern: Pattern) -> None:
    def blocks(size: int) -> Tensor:
        return torch.cat([random_order(size, i) + i * size for i in range(256 // size)])

    for size in (32, 64, 128, 256):
        kept = kept_of(400, blocks(size), pattern)
        assert BlockSearch().smallest_block("qkv", kept, pattern) == size
        if size > 64:
            assert recover_permutation(kept, pattern, 64) is None
    assert BlockSearch().smallest_block("qkv", kept[:100], pattern) is None  # too few to tell
    random = torch.rand(400, 256, generator=torch.Generator().manual_seed(0))
    unstructured = random.argsort(dim=1).argsort(dim=1) < 128
    assert BlockSearch().smallest_block("qkv", unstructured, pattern) is None


def test_says_nothing_of_a_group_that_it_has_not_looked_at() -> None:
    search, pattern = BlockSearch(), PATTERNS[0]
    kept = kept_of(400, torch.arange(256), pattern)
    assert search.smallest_block("first", kept, pattern) == 32
    assert search.smallest_block("second", kept, pattern) is None
    assert search.smallest_block("first", kept, pattern) == 32
