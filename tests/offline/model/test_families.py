import re
import shlex
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from permllm_offline.errors import OfflineError
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.family import Fold
from permllm_offline.model.heads import Heads, heads_of, kv_cache_bytes
from permllm_offline.model.ignored_linears import ignored_linears
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.lookup import family_of
from permllm_offline.model.row_parts import (
    every_row,
    first_half,
    second_half,
    values_last,
    values_of_each_head,
)
from permllm_offline.recipe.methods import METHODS
from tests.offline.tiny_models import tiny_model


def test_folds_name_linears_of_the_family() -> None:
    for family in FAMILIES.values():
        for group in family.groups:
            assert {part.linear for part in group.fold_into} <= set(family.linears)
            assert (group.fold is Fold.NONE) == (not group.fold_into)


def test_layers_of_a_hybrid_model_have_groups_of_their_own() -> None:
    family = FAMILIES["qwen3_5_text"]
    full = [one.name for one in family.groups_of(lambda linear: "self_attn" in linear)]
    assert full == ["qkv", "o", "gate_up", "down"]
    linear = [one.name for one in family.groups_of(lambda linear: "linear_attn" in linear)]
    assert linear == ["qkvz", "linear_o", "gate_up", "down"]
    assert FAMILIES["llama"].groups_of(lambda linear: False) == list(FAMILIES["llama"].groups)


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox"])
def test_the_cache_is_as_large_as_that_of_transformers(model_type: str) -> None:
    model = tiny_model(model_type)
    with torch.no_grad():
        cache = model(torch.arange(2, 9)[None], use_cache=True).past_key_values
    held = [tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert kv_cache_bytes(model.config, tokens=7, itemsize=4) == sum(held)


def test_heads_fall_back_to_hidden_size() -> None:
    config = SimpleNamespace(num_attention_heads=4, hidden_size=320)
    assert heads_of(config) == Heads(4, 4, 80)


def test_rows_of_a_value_fold_are_those_of_the_first_query_head() -> None:
    group = next(g for g in FAMILIES["llama"].groups if g.fold is Fold.VALUE_HEADS)
    layout = GroupLayout(group, 4 * 64, 64, Heads(4, 2, 64))
    order = torch.stack([torch.randperm(64), torch.randperm(64)])
    rows = layout.rows(layout.expand(order))
    assert torch.equal(rows.reshape(2, 64).long(), order)


def test_channels_must_fill_blocks() -> None:
    layout = GroupLayout(FAMILIES["llama"].groups[0], 100, 64, Heads(1, 1, 100))
    message = r"100 input channels.*block size 64.*give --ignore .* a --"
    with pytest.raises(OfflineError, match=message) as found:
        layout.check_blocks("model.layers.0.self_attn.q_proj")
    named = re.split(r", | or ", str(found.value).rpartition(": ")[2].rstrip("."))
    unpermuted = (name for name, method in METHODS.items() if method.permutation == "none")
    assert set(named) == set(unpermuted)
    layout = GroupLayout(FAMILIES["llama"].groups[0], 96, 64, Heads(1, 1, 96))
    with pytest.raises(OfflineError, match=r"give block size 32, or --ignore .*, or a --method"):
        layout.check_blocks("model.layers.0.self_attn.q_proj")


@pytest.mark.parametrize("model_type", ["llama", "phi3", "opt", "qwen3_moe", "mixtral"])
def test_what_a_message_would_ignore_can_be(model_type: str) -> None:
    family = family_of(tiny_model(model_type).config)
    layers = [partial(family.stored_name, index) for index in range(2)]
    groups = [list(map(name, group.linears)) for name in layers for group in family.groups]
    mixed = [name for group in family.groups if group.experts for name in group.linears]
    mixtures = [list(map(name, mixed)) for name in layers]
    for group in family.groups:
        layout = GroupLayout(group, 100, 64, Heads(1, 1, 100))
        option, entry = shlex.split(layout.ignoring())
        assert option == "--ignore"
        left = ignored_linears([entry], groups, [], mixtures)
        assert {name(one) for name in layers for one in group.linears} <= left


def test_parts_of_fused_linears() -> None:
    heads = Heads(query=3, key_value=1, size=2)
    assert every_row(4, heads).tolist() == [0, 1, 2, 3]
    assert first_half(4, heads).tolist() == [0, 1]
    assert second_half(4, heads).tolist() == [2, 3]
    assert values_last(10, heads).tolist() == [8, 9]
    heads = Heads(query=2, key_value=2, size=2)
    assert values_of_each_head(12, heads).tolist() == [4, 5, 10, 11]
