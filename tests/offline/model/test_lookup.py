"""Configurations find their family, with what they say of experts and layers, or are refused."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from permllm_offline.errors import OfflineError
from permllm_offline.model.lookup import family_of


def test_an_unsupported_family_is_told_what_is_supported() -> None:
    known = "llama, ministral, ministral3, mistral, mixtral, nemotron"
    with pytest.raises(
        OfflineError, match=rf"'bloom' is not supported: the table.*{known}.*entry to FAMILIES in"
    ):
        family_of(SimpleNamespace(model_type="bloom"))


def test_the_language_model_of_a_model_of_images_is_named() -> None:
    config = SimpleNamespace(model_type="gemma3", text_config=SimpleNamespace(model_type="mistral"))
    with pytest.raises(
        OfflineError,
        match=r"'gemma3' is not.* of model_type 'mistral', is, but",
    ):
        family_of(config)
    config.text_config.model_type = "bloom"
    with pytest.raises(OfflineError, match=r"'gemma3' is not.* Prune a model of one of these"):
        family_of(config)


def test_experts_of_another_form_are_refused() -> None:
    config = AutoConfig.for_model("llama", num_local_experts=8)
    with pytest.raises(
        OfflineError, match=r"has 8 experts .* only mixtral, qwen3_moe are.* without experts"
    ):
        family_of(config)


def test_experts_with_another_activation_are_refused() -> None:
    config = AutoConfig.for_model("mixtral", hidden_act="gelu")
    with pytest.raises(OfflineError, match="hidden_act is 'gelu', but sparse experts"):
        family_of(config)


def test_every_expert_has_groups_of_its_own() -> None:
    config = AutoConfig.for_model("qwen3_moe", num_experts=6, num_experts_per_tok=3)
    family = family_of(config)
    dense = [one.name for one in family.groups_of(lambda linear: "experts" not in linear)]
    assert dense == ["qkv", "o", "gate_up", "down"]
    groups = family.groups_of(lambda linear: "experts" in linear)
    assert [one.linears for one in groups[2:4]] == [
        ("mlp.experts.0.gate_proj", "mlp.experts.0.up_proj"),
        ("mlp.experts.0.down_proj",),
    ]
    assert len({one.name for one in groups}) == len(groups) == 2 + 2 * 6
    assert {one.share for one in groups[2:]} == {0.5}
    assert [part.linear for part in groups[-1].fold_into] == [
        "mlp.experts.5.gate_proj",
        "mlp.experts.5.up_proj",
    ]


def test_mistral_has_the_same_layout() -> None:
    assert family_of(MistralConfig()) == family_of(LlamaConfig())
