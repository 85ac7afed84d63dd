import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from permllm_vllm.checkpoint import permutation
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern

BLOCKS = st.sampled_from([32, 64, 128])
patterns = st.sampled_from([Pattern(2, 4), Pattern(4, 8)])


@st.composite
def permutations(draw: st.DrawFn) -> tuple[int, torch.Tensor]:
    block, blocks = draw(BLOCKS), draw(st.integers(1, 3))
    shuffle = random.Random(draw(st.integers(0, 2**31)))
    return block, random_permutation(block, blocks, shuffle)


def random_permutation(block: int, blocks: int, shuffle: random.Random) -> torch.Tensor:
    entries: list[int] = []
    for _ in range(blocks):
        entries += shuffle.sample(range(block), block)
    return torch.tensor(entries, dtype=torch.uint8)


@given(permutations())
def test_columns_move_as_the_definition_says(case: tuple[int, torch.Tensor]) -> None:
    block, local = case
    weight = torch.arange(3 * local.numel()).view(3, -1)
    moved = permutation.permute_columns(weight, local, block)
    for j, entry in enumerate(local.tolist()):
        assert torch.equal(moved[:, j], weight[:, j // block * block + entry])
    assert torch.equal(permutation.unpermute_columns(moved, local, block), weight)
    activation = weight[0]
    assert torch.equal(permutation.permute_columns(activation, local, block), moved[0])


@given(permutations())
def test_absolute_and_local_are_inverse(case: tuple[int, torch.Tensor]) -> None:
    block, local = case
    absolute = permutation.absolute(local, block)
    assert absolute.dtype == torch.int64
    assert sorted(absolute.tolist()) == list(range(local.numel()))
    assert torch.equal(permutation.local(absolute, block), local)


@given(permutations())
def test_a_slice_of_whole_blocks_is_a_permutation(case: tuple[int, torch.Tensor]) -> None:
    block, local = case
    assert permutation.is_bijective(local[-block:], block)
    assert torch.equal(
        permutation.absolute(local[-block:], block) + local.numel() - block,
        permutation.absolute(local, block)[-block:],
    )


@given(permutations())
def test_inverse_undoes(case: tuple[int, torch.Tensor]) -> None:
    block, local = case
    channels = torch.arange(local.numel())
    undo = permutation.inverse(local, block)
    assert undo.dtype == torch.uint8
    for first, second in ((local, undo), (undo, local)):
        moved = permutation.permute_columns(channels, first, block)
        assert torch.equal(permutation.permute_columns(moved, second, block), channels)


def canonical_by_hand(local: list[int], block: int, group: int) -> list[int]:
    entries: list[int] = []
    for start in range(0, len(local), block):
        groups = [sorted(local[i : i + group]) for i in range(start, start + block, group)]
        entries += [channel for members in sorted(groups) for channel in members]
    return entries


@given(permutations(), patterns, st.integers(0, 2**31))
def test_canonical_form_depends_on_the_partition_alone(
    case: tuple[int, torch.Tensor], pattern: Pattern, seed: int
) -> None:
    block, local = case
    form = permutation.canonical(local, block, pattern)
    assert form.dtype == torch.uint8
    assert form.tolist() == canonical_by_hand(local.tolist(), block, pattern.group)
    assert torch.equal(permutation.canonical(form, block, pattern), form)

    shuffle = random.Random(seed)
    entries: list[int] = []
    for start in range(0, local.numel(), block):
        groups = [
            local[i : i + pattern.group].tolist()
            for i in range(start, start + block, pattern.group)
        ]
        for members in shuffle.sample(groups, len(groups)):
            entries += shuffle.sample(members, len(members))
    same_partition = torch.tensor(entries, dtype=torch.uint8)
    assert torch.equal(permutation.canonical(same_partition, block, pattern), form)


@given(permutations(), st.integers(0, 10_000), st.integers(1, 255))
def test_any_changed_entry_is_no_bijection(
    case: tuple[int, torch.Tensor], position: int, change: int
) -> None:
    block, local = case
    assert permutation.is_bijective(local, block)
    local[position % local.numel()] += change  # wraps: uint8
    assert not permutation.is_bijective(local, block)


def test_partial_blocks_are_refused() -> None:
    assert not permutation.is_bijective(torch.arange(60, dtype=torch.uint8), 64)
    with pytest.raises(CheckpointError, match=r"96 input channels.*block size 64.*smaller block"):
        permutation.absolute(torch.zeros(96, dtype=torch.uint8), 64)


def test_a_permutation_over_all_channels_cannot_be_written() -> None:
    crossing = torch.arange(128)
    crossing[[3, 70]] = crossing[[70, 3]]
    with pytest.raises(CheckpointError, match=r"channel 70 to position 3.*block of 64"):
        permutation.local(crossing, 64)


def test_sizes_must_agree() -> None:
    with pytest.raises(CheckpointError, match=r"has 128 channels in dimension -1.*64"):
        permutation.permute_columns(torch.zeros(2, 128), torch.arange(64, dtype=torch.uint8), 64)
