"""Names of the model and of the checkpoint lead to one another, as Transformers leads them."""

from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from permllm_offline.model.families import FAMILIES
from permllm_offline.model.language_model import TensorNames, language_model_of
from permllm_offline.model.renaming import own_part, stored_part
from tests.offline.tiny_models import tiny_model

RENAMED = [name for name, family in FAMILIES.items() if family.renamed]
MIXTRAL = FAMILIES["mixtral"]


@st.composite
def parts(draw: st.DrawFn) -> tuple[tuple[tuple[str, str], ...], str]:
    """Pairs of a family, and what a decoder layer of it may call a module."""
    renamed = FAMILIES[draw(st.sampled_from(RENAMED))].renamed
    own = [own for own, _ in renamed]
    words = [word for name in own for word in name.split(".")]
    name = draw(st.lists(st.sampled_from([*words, "experts", "0", "self_attn"]), max_size=3))
    first = draw(st.sampled_from([*own, "mlp", "mlp.gate", "self_attn"]))
    return renamed, ".".join([first, *name])


@given(parts())
def test_an_own_part_comes_back(case: tuple[tuple[tuple[str, str], ...], str]) -> None:
    renamed, part = case
    # No part of the model has a name that only the checkpoint has for another.
    assume(stored_part(part, renamed) != part or own_part(part, renamed) == part)
    assert own_part(stored_part(part, renamed), renamed) == part


def test_parts_are_whole_words_of_a_name() -> None:
    assert stored_part("mlp", MIXTRAL.renamed) == "block_sparse_moe"
    assert stored_part("mlp.experts.3.w1", MIXTRAL.renamed) == "block_sparse_moe.experts.3.w1"
    for part in ("mlp_norm", "self_attn.mlp", "self_attn.q_proj"):
        assert stored_part(part, MIXTRAL.renamed) == part


def test_only_what_is_in_decoder_layers_is_renamed() -> None:
    names = TensorNames(
        (("model.", "model.language_model."), ("lm_head.", "lm_head.")),
        layers="model.layers.",
        renamed=MIXTRAL.renamed,
    )
    pairs = {
        "model.layers.10.mlp.gate.weight": (
            "model.language_model.layers.10.block_sparse_moe.gate.weight"
        ),
        "model.mlp.weight": "model.language_model.mlp.weight",
        "lm_head.weight": "lm_head.weight",
        "model.layers.": "model.language_model.layers.",
    }
    for own, stored in pairs.items():
        assert (names.stored(own), names.own(stored)) == (stored, own)
    assert names.own("visual.layers.0.mlp.weight") is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_that_transformers_loads(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    changes = [
        one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)
    ]
    names = language_model_of(model.config, ()).names
    for own in model.state_dict():
        assert rename_source_key(names.stored(own), changes, []) == (own, None)
        assert names.own(names.stored(own)) == own
