from itertools import permutations

import pytest
import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.family import Fold, SharedInputGroup
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.permutation.channel_permutation import allocate_group
from permllm_offline.permutation.linear_assignment import assign_group, assignment_gains, refine
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern

PATTERNS = [Pattern(2, 4), Pattern(4, 8)]


def random_importance(rows: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(channels, generator=generator) ** 3
    return torch.rand(rows, channels, generator=generator) * scale


def kept(importance: Tensor, order: Tensor, pattern: Pattern) -> float:
    grouped = importance[:, order].unflatten(1, (-1, pattern.group))
    return float(grouped.topk(pattern.kept, dim=2).values.double().sum())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_gains_are_what_the_best_n_gain(pattern: Pattern) -> None:
    importance = random_importance(7, 32)
    groups = torch.randperm(32, generator=torch.Generator().manual_seed(2))
    groups = groups.reshape(-1, pattern.group)
    gains = assignment_gains(importance.t().contiguous(), groups[:, 0], groups[:, 1:], pattern)
    for group in range(len(groups)):
        rest = importance[:, groups[group, 1:]]
        alone = rest.topk(pattern.kept, dim=1).values.sum()
        for candidate in range(len(groups)):
            whole = torch.cat([rest, importance[:, groups[candidate, :1]]], dim=1)
            expected = whole.topk(pattern.kept, dim=1).values.sum() - alone
            assert float(gains[group, candidate]) == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_keeps_more_than_the_heuristic(pattern: Pattern) -> None:
    importance = random_importance(48, 64)
    layout = GroupLayout(SharedInputGroup("x", ("a",)), 64, 64, Heads(1, 1, 64))
    heuristic = allocate_group(layout, {"a": importance}, pattern)
    refined = assign_group(layout, {"a": importance}, pattern)
    assert torch.equal(refined[0].sort().values, torch.arange(64))
    assert kept(importance, refined[0], pattern) > kept(importance, heuristic[0], pattern) * 1.001


def test_finds_the_best_partition_of_two_groups() -> None:
    importance = random_importance(9, 8)
    best = max(
        kept(importance, torch.tensor(order), PATTERNS[0]) for order in permutations(range(8))
    )
    starts = [torch.randperm(8, generator=torch.Generator().manual_seed(s)) for s in range(12)]
    found = [
        kept(importance, refine(importance, start, PATTERNS[0]), PATTERNS[0]) for start in starts
    ]
    assert max(found) == pytest.approx(best)
    before = [kept(importance, start, PATTERNS[0]) for start in starts]
    assert all(after >= first for after, first in zip(found, before, strict=True))


def test_equal_channels_stay() -> None:
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(refine(torch.ones(3, 16), order, PATTERNS[0]), order)


def test_tied_blocks_share_the_permutation_that_suits_all_their_rows() -> None:
    group = next(g for g in FAMILIES["llama"].groups if g.fold is Fold.VALUE_HEADS)
    layout = GroupLayout(group, 4 * 64, 64, Heads(4, 2, 64))
    importance = (random_importance(20, 256) * 4096).round()  # whole numbers: sums are exact
    order = assign_group(layout, {"o": importance}, PATTERNS[0])
    stacked = torch.cat([importance[:, :64], importance[:, 64:128]])
    alone = GroupLayout(SharedInputGroup("x", ("a",)), 64, 64, Heads(1, 1, 64))
    assert order.shape == (2, 64)
    assert torch.equal(order[0], assign_group(alone, {"a": stacked}, PATTERNS[0])[0])


def test_one_block_may_be_as_wide_as_the_layer() -> None:
    importance = random_importance(24, 512)
    narrow = GroupLayout(SharedInputGroup("x", ("a",)), 512, 64, Heads(1, 1, 64))
    wide = GroupLayout(narrow.group, 512, 512, narrow.heads)
    retained = []
    for layout in (narrow, wide):
        permutation = layout.expand(assign_group(layout, {"a": importance}, PATTERNS[0]))
        mask = choose_mask(importance, PATTERNS[0], permutation, layout.block_size)
        assert mask.sum() == mask.numel() // 2
        retained.append(float(importance[mask].sum()))
    assert retained[1] > retained[0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_importance_that_is_not_finite_is_refused(value: float) -> None:
    importance = random_importance(3, 64)
    bad = importance.clone()
    bad[2, 40] = value
    layout = GroupLayout(SharedInputGroup("x", ("a", "b")), 64, 32, Heads(1, 1, 32))
    with pytest.raises(OfflineError, match="importance of b is not finite"):
        assign_group(layout, {"a": importance, "b": bad}, PATTERNS[0])
