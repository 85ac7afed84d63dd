import torch

from permllm_offline.model.families import FAMILIES
from permllm_offline.model.family import Fold, SharedInputGroup
from permllm_offline.model.heads import Heads
from permllm_offline.model.layout import GroupLayout
from permllm_offline.permutation.channel_permutation import (
    allocate_channels,
    allocate_group,
    block_importance,
)
from permllm_offline.sparsity.mask import choose_mask
from permllm_vllm.checkpoint.pattern import Pattern

TWO_FOUR = Pattern(2, 4)


def test_deals_back_and_forth() -> None:
    importance = torch.tensor([[8.0, 7, 6, 5, 4, 3, 2, 1]])
    order = allocate_channels(importance, TWO_FOUR)
    # Two groups: 8 7 | then backwards 5 6 | then 4 3 | then backwards 1 2.
    assert order.tolist() == [[0, 3, 4, 7, 1, 2, 5, 6]]


def test_every_group_holds_one_channel_of_every_quartile() -> None:
    importance = torch.rand(7, 64)
    order = allocate_channels(importance, TWO_FOUR)
    ranks = importance.argsort(dim=1, descending=True).argsort(dim=1)
    quartiles = ranks.gather(1, order) // 16
    assert (quartiles.reshape(7, 16, 4).sort(dim=2).values == torch.arange(4)).all()


def test_is_a_bijection_for_four_of_eight() -> None:
    order = allocate_channels(torch.rand(3, 128), Pattern(4, 8))
    assert (order.sort(dim=1).values == torch.arange(128)).all()


def test_keeps_more_importance_than_the_original_order() -> None:
    importance = torch.rand(32, 64) * (torch.arange(64).float() + 1)
    layout = GroupLayout(SharedInputGroup("x", ("a",)), 64, 64, Heads(1, 1, 64))
    permutation = layout.expand(allocate_group(layout, {"a": importance}, TWO_FOUR))
    before = importance[choose_mask(importance, TWO_FOUR, None, 64)].sum()
    after = importance[choose_mask(importance, TWO_FOUR, permutation, 64)].sum()
    assert after > before


def test_linears_of_a_group_are_summed() -> None:
    layout = GroupLayout(SharedInputGroup("x", ("a", "b")), 64, 64, Heads(1, 1, 64))
    first, second = torch.rand(5, 64), torch.rand(9, 64)
    together = allocate_group(layout, {"a": first, "b": second}, TWO_FOUR)
    stacked = allocate_group(layout, {"a": torch.cat([first, second])}, TWO_FOUR)
    assert torch.equal(together, stacked)


def test_tied_blocks_are_summed() -> None:
    channels = torch.arange(12.0)
    total = block_importance(channels, torch.tensor([0, 0, 1]), 4)
    assert total.tolist() == [[4.0, 6, 8, 10], [8, 9, 10, 11]]


def test_query_heads_of_a_value_head_share_blocks() -> None:
    group = next(g for g in FAMILIES["llama"].groups if g.fold is Fold.VALUE_HEADS)
    layout = GroupLayout(group, 4 * 128, 64, Heads(4, 2, 128))
    assert layout.ties().tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert not GroupLayout(group, 4 * 96, 64, Heads(4, 2, 96)).folded
    assert GroupLayout(group, 4 * 96, 64, Heads(4, 2, 96)).ties().tolist() == list(range(6))
