"""Groups of channels are found from zeros alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from permllm_offline.conversion.recovery import obeys, recover_block, recover_permutation
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical
from tests.conversion.sparse_models import prune_in_order

PATTERNS = [Pattern(2, 4), Pattern(4, 8)]


def kept_of(rows: int, order: Tensor, pattern: Pattern, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.rand(rows, len(order), generator=generator) + 0.1
    return prune_in_order(weight, order, *pattern) != 0


def random_order(channels: int, seed: int = 0) -> Tensor:
    return torch.randperm(channels, generator=torch.Generator().manual_seed(seed))


def groups_of(order: Tensor, pattern: Pattern) -> set[frozenset[int]]:
    return {frozenset(part.tolist()) for part in order.split(pattern.group)}


def breaks(kept: Tensor, order: Tensor, pattern: Pattern) -> int:
    """Count groups of a row that keep too many, in plain loops."""
    return sum(
        sum(bool(row[channel]) for channel in group) > pattern.kept
        for row in kept.tolist()
        for group in groups_of(order, pattern)
    )


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(seed=st.integers(0, 2**30), extra=st.booleans())
@settings(deadline=None, max_examples=15)
def test_obeying_is_judged_as_in_plain_loops(pattern: Pattern, seed: int, extra: bool) -> None:
    order = random_order(32, seed)
    kept = kept_of(3, order, pattern, seed)
    if extra:
        kept[seed % 3, order[seed % 32]] = True
    assert obeys(kept, pattern, order, 32) == (breaks(kept, order, pattern) == 0)
    assert obeys(kept[:, order], pattern, None, 32) == (breaks(kept, order, pattern) == 0)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(seed=st.integers(0, 2**30), channels=st.sampled_from([32, 64, 128]))
@settings(deadline=None, max_examples=15)
def test_enough_rows_give_the_very_groups(pattern: Pattern, seed: int, channels: int) -> None:
    order = random_order(channels, seed)
    kept = kept_of(2 * channels, order, pattern, seed)
    found = recover_block(kept, pattern)
    assert found is not None
    assert groups_of(found, pattern) == groups_of(order, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@given(seed=st.integers(0, 2**30), rows=st.integers(1, 60))
@settings(deadline=None, max_examples=15)
def test_what_few_rows_give_is_valid_or_nothing(pattern: Pattern, seed: int, rows: int) -> None:
    kept = kept_of(rows, random_order(16, seed), pattern, seed)
    found = recover_block(kept, pattern)
    assert found is None or (
        sorted(found.tolist()) == list(range(16)) and breaks(kept, found, pattern) == 0
    )


def test_few_rows_are_searched() -> None:
    kept = kept_of(6, random_order(16), Pattern(2, 4))
    assert recover_block(kept, Pattern(2, 4)) is not None


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_accidental_zeros_do_not_matter(pattern: Pattern) -> None:
    order = random_order(64)
    kept = kept_of(300, order, pattern)
    kept[::3] &= torch.rand(100, 64, generator=torch.Generator().manual_seed(1)) < 0.97
    kept[7] = False
    found = recover_block(kept, pattern)
    assert found is not None
    assert groups_of(found, pattern) == groups_of(order, pattern)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_one_weight_too_many_is_noticed(pattern: Pattern) -> None:
    order = random_order(64)
    kept = kept_of(300, order, pattern)
    kept[5, order[: pattern.group]] = True
    assert recover_block(kept, pattern) is None


def test_pairs_of_which_every_row_keeps_one_are_joined() -> None:
    pairs = torch.rand(200, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    kept = torch.stack([pairs, ~pairs], dim=2).flatten(1)[:, random_order(16)]
    for pattern in PATTERNS:
        found = recover_permutation(kept, pattern, 16)
        assert found is not None
        assert breaks(kept, found.long(), pattern) == 0
        assert torch.equal(found, canonical(found, 16, pattern))


def test_channels_that_are_never_kept_are_placed() -> None:
    """Dead channels make more than one answer right; one of them comes."""
    weight = torch.rand(300, 64, generator=torch.Generator().manual_seed(3)) + 0.1
    weight[:, [3, 17, 40]] = 1e-6
    kept = prune_in_order(weight, random_order(64), 2, 4) != 0
    found = recover_block(kept, Pattern(2, 4))
    assert found is not None
    assert breaks(kept, found, Pattern(2, 4)) == 0


def test_random_zeros_have_no_groups() -> None:
    random = torch.rand(300, 64, generator=torch.Generator().manual_seed(0))
    half = random.argsort(dim=1).argsort(dim=1) < 32
    for pattern in PATTERNS:
        assert recover_block(half, pattern) is None


def test_tied_blocks_get_one_permutation() -> None:
    pattern, order = Pattern(2, 4), random_order(64)
    kept = torch.cat([kept_of(20, order, pattern, seed) for seed in (1, 2, 3)], dim=1)
    ties = torch.zeros(3, dtype=torch.long)
    found = recover_permutation(kept, pattern, 64, ties)  # 20 rows do not do for one block alone
    assert found is not None
    assert found.dtype == torch.uint8
    assert torch.equal(found[:64], found[64:128])
    assert torch.equal(found[:64], found[128:])
    assert groups_of(found[:64].long(), pattern) == groups_of(order, pattern)
    assert obeys(kept, pattern, found, 64)
    assert torch.equal(found, canonical(found, 64, pattern))

    other = torch.cat([kept_of(200, random_order(64, s), pattern, s) for s in (1, 2, 3)], dim=1)
    assert recover_permutation(other, pattern, 64, ties) is None
    assert recover_permutation(other, pattern, 64) is not None
