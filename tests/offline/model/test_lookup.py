"""Configurations find their family, with what they say of experts and layers, or are refused."""

from types import SimpleNamespace

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig

from permllm_offline.errors import OfflineError
from permllm_offline.model.families import FAMILIES
from permllm_offline.model.lookup import family_of


def test_an_unsupported_family_is_told_what_is_supported() -> None:
    known = "lfm2, lfm2_moe, llama, mellum, minimax_m2, ministral, ministral3, mistral, mixtral"
    with pytest.raises(OfflineError, match=rf"'bloom' is not supported.*{known}.*FAMILIES"):
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
    known = "qwen2_moe, qwen3_5_moe_text, qwen3_moe, qwen3_next, solar_open are"
    with pytest.raises(
        OfflineError, match=rf"has 8 experts .* only afmoe, .*{known}.* without experts"
    ):
        family_of(config)


def test_a_family_with_and_without_experts() -> None:
    config = AutoConfig.for_model("granitemoehybrid", num_local_experts=0)
    assert family_of(config).groups == FAMILIES["granitemoehybrid"].groups
    config.num_local_experts = 2
    experts = {one.experts for one in family_of(config).groups}
    assert experts == {"", "block_sparse_moe.experts"}


def test_experts_with_another_activation_are_refused() -> None:
    config = AutoConfig.for_model("olmoe", hidden_act="gelu")
    with pytest.raises(OfflineError, match="hidden_act is 'gelu', but sparse experts"):
        family_of(config)


def test_experts_without_a_gate() -> None:
    config = AutoConfig.for_model("nemotron_h", hybrid_override_pattern="M*E", n_routed_experts=2)
    groups = family_of(config).groups_of(2, lambda linear: "experts" in linear)
    assert [one.linears for one in groups[-2:]] == [
        ("mixer.experts.1.up_proj",),
        ("mixer.experts.1.down_proj",),
    ]
    assert groups[-2].reads_whole


def test_a_model_whose_pattern_has_no_experts() -> None:
    config = AutoConfig.for_model("nemotron_h", hybrid_override_pattern="M*-")
    assert config.num_local_experts  # by default
    assert family_of(config).groups == FAMILIES["nemotron_h"].groups


def test_mamba_layers_that_vllm_computes_otherwise_are_refused() -> None:
    config = AutoConfig.for_model("falcon_h1", mamba_rms_norm=True)
    with pytest.raises(OfflineError, match="mamba_norm_before_gate is True, which"):
        family_of(config)
    config.mamba_rms_norm = False
    assert family_of(config) == FAMILIES["falcon_h1"]
    config.time_step_limit = (0.0, 1.0)
    with pytest.raises(OfflineError, match=r"time_step_limit is \(0.0, 1.0\), which vLLM"):
        family_of(config)


def test_every_expert_has_groups_of_its_own() -> None:
    config = AutoConfig.for_model("qwen3_moe", num_experts=6, num_experts_per_tok=3)
    family = family_of(config)
    dense = [one.name for one in family.groups_of(0, lambda linear: "experts" not in linear)]
    assert dense == ["qkv", "o", "gate_up", "down"]
    groups = family.groups_of(0, lambda linear: "experts" in linear)
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
    config.num_experts = 0
    assert family_of(config).groups == FAMILIES["qwen3_moe"].groups


def test_layers_may_differ_in_the_experts_that_a_token_takes() -> None:
    config = AutoConfig.for_model("hunyuan_v1_moe", num_experts=4, moe_topk=[1, 2])
    assert family_of(config).groups[-1].share == 1.5 / 4


def test_mistral_has_the_same_layout() -> None:
    assert family_of(MistralConfig()) == family_of(LlamaConfig())
