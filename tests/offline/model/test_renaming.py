"""Names of the model and of the checkpoint lead to one another, as Transformers leads them."""

from functools import cache
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from permllm_offline.model.families import FAMILIES, WRAPPINGS
from permllm_offline.model.family import Family
from permllm_offline.model.language_model import TensorNames, language_model_of
from permllm_offline.model.renaming import stored_part
from tests.offline.tiny_models import tiny_model

RENAMED = [name for name, family in FAMILIES.items() if family.renamed]
MIXTRAL = FAMILIES["mixtral"]


@cache
def parts_of(model_type: str) -> list[str]:
    """What decoder layers of a family call their modules and tensors."""
    layers = tiny_model(model_type).model.layers
    found = {name for layer in layers for name, _ in layer.named_modules() if name}
    return sorted(found | {name for layer in layers for name in layer.state_dict()})


@st.composite
def names(draw: st.DrawFn) -> tuple[TensorNames, str]:
    """Of a family, in a checkpoint of its own or of more than a language model."""
    model_type = draw(st.sampled_from(RENAMED))
    family, wrapping = FAMILIES[model_type], draw(st.sampled_from([None, *WRAPPINGS]))
    prefixes = TensorNames().prefixes
    if wrapping is not None:
        model, head = wrapping
        prefixes = (("model.", f"{model}."), ("lm_head.", f"{head}."))
    layer, part = draw(st.integers(0, 999)), draw(st.sampled_from(parts_of(model_type)))
    found = TensorNames(prefixes, layers=f"{family.layers}.", renamed=family.renamed)
    return found, f"{family.layers}.{layer}.{part}"


@given(names())
def test_an_own_name_comes_back(case: tuple[TensorNames, str]) -> None:
    tensor_names, own = case
    assert tensor_names.own(tensor_names.stored(own)) == own
    family = Family("", (), (), renamed=tuple(tensor_names.renamed))
    _, _, layer, part = own.split(".", 3)
    assert tensor_names.stored(own).endswith(family.stored_name(int(layer), part))


def test_parts_are_whole_words_of_a_name() -> None:
    assert stored_part("mlp", MIXTRAL.renamed) == "block_sparse_moe"
    assert stored_part("mlp.experts.3.w1", MIXTRAL.renamed) == "block_sparse_moe.experts.3.w1"
    for part in ("mlp_norm", "self_attn.mlp", "self_attn.q_proj"):
        assert stored_part(part, MIXTRAL.renamed) == part


def test_only_what_is_in_decoder_layers_is_renamed() -> None:
    tensor_names = TensorNames(
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
        assert (tensor_names.stored(own), tensor_names.own(stored)) == (stored, own)
    assert tensor_names.own("visual.layers.0.mlp.weight") is None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_are_those_that_transformers_loads(model_type: str) -> None:
    model: Any = tiny_model(model_type)
    changes = [
        one for one in get_model_conversion_mapping(model) if isinstance(one, WeightRenaming)
    ]
    tensor_names = language_model_of(model.config, ()).names
    for own in model.state_dict():
        assert rename_source_key(tensor_names.stored(own), changes, []) == (own, None)
        assert tensor_names.own(tensor_names.stored(own)) == own
