import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.sparsity.mask import choose_mask, keep_channels, pack_channels, unpack_channels
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern
from permllm_vllm.checkpoint.permutation import absolute

PATTERNS = [Pattern.parse(text) for text in SUPPORTED]


def plain_mask(importance: Tensor, pattern: Pattern, order: list[int]) -> Tensor:
    """Rows one by one, groups one by one, sorted by (-importance, position)."""
    mask = torch.zeros(importance.shape, dtype=torch.bool)
    for row in range(importance.shape[0]):
        for start in range(0, importance.shape[1], pattern.group):
            members = order[start : start + pattern.group]
            ranked = sorted(
                range(pattern.group), key=lambda i: (-float(importance[row, members[i]]), i)
            )
            for position in ranked[: pattern.kept]:
                mask[row, members[position]] = True
    return mask


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_equals_a_plain_loop(pattern: Pattern, ties: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    importance = torch.rand(5, 64, generator=generator)
    if ties:
        importance = (importance * 3).round()
    expected = plain_mask(importance, pattern, list(range(64)))
    assert torch.equal(choose_mask(importance, pattern, None, 32), expected)


@given(
    st.sampled_from(PATTERNS),
    st.integers(1, 4),
    st.integers(1, 3),
    st.sampled_from([2, 5, 1000]),
    st.integers(0, 2**31),
)
def test_equals_a_plain_loop_however_many_scores_are_equal(
    pattern: Pattern, rows: int, blocks: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    importance = torch.randint(0, levels, (rows, 64 * blocks), generator=generator).float()
    expected = plain_mask(importance, pattern, list(range(64 * blocks)))
    assert torch.equal(choose_mask(importance, pattern, None, 64), expected)


@pytest.mark.parametrize("pattern", [one for one in PATTERNS if one.group <= 32], ids=str)
def test_groups_follow_the_permutation(pattern: Pattern) -> None:
    generator = torch.Generator().manual_seed(4)
    importance = (torch.rand(6, 64, generator=generator) * 5).round()
    blocks = [torch.randperm(32, generator=generator) for _ in range(2)]
    permutation = torch.cat(blocks).to(torch.uint8)
    order = absolute(permutation, 32).tolist()
    expected = plain_mask(importance, pattern, order)
    assert torch.equal(choose_mask(importance, pattern, permutation, 32), expected)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_group_keeps_exactly_n_even_of_equal_scores(pattern: Pattern) -> None:
    mask = keep_channels(torch.zeros(64, 3), pattern)
    counts = mask.reshape(-1, pattern.group, 3).sum(1)
    assert (counts == pattern.kept).all()
    assert mask[: pattern.kept].all()


def test_packed_channels_come_back() -> None:
    generator = torch.Generator().manual_seed(5)
    mask = torch.randint(0, 2, (32, 7), generator=generator, dtype=torch.uint8)
    packed = pack_channels(mask)
    assert packed.shape == (4, 7)
    assert packed[1, 3] == sum(int(mask[8 + bit, 3]) << bit for bit in range(8))
    assert torch.equal(unpack_channels(packed), mask)
