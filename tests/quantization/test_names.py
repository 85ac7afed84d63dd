"""vLLM's names of modules are taken back to those of the checkpoint."""

import pytest
from transformers import PreTrainedConfig
from vllm.model_executor.models.utils import WeightsMapper

from permllm_vllm.quantization.names import NAMINGS, checkpoint_name, original_names

PREFIX = WeightsMapper(orig_to_new_prefix={"model.language_model.": "language_model.model."})
PART = WeightsMapper(orig_to_new_substr={".attn.": ".self_attn."})
SUFFIX = WeightsMapper(orig_to_new_suffix={".w1": ".gate_proj", ".w3": ".up_proj"})
ALL = WeightsMapper(
    orig_to_new_prefix=PREFIX.orig_to_new_prefix,
    orig_to_new_substr={**PART.orig_to_new_substr, "dropped.": None},
    orig_to_new_suffix=SUFFIX.orig_to_new_suffix,
)


@pytest.mark.parametrize(
    ("mapper", "original"),
    [
        (PREFIX, "model.language_model.layers.0.self_attn.o_proj"),
        (PART, "layers.0.attn.o_proj"),
        (SUFFIX, "layers.0.mlp.w3"),
        (ALL, "model.language_model.layers.0.attn.w1"),
        (ALL, "lm_head"),
    ],
)
def test_renaming_is_undone(mapper: WeightsMapper, original: str) -> None:
    (renamed,) = mapper.apply_list([original])
    names = original_names(renamed, [mapper])
    assert original in names
    assert names[0] == renamed
    assert all(mapper.apply_list([name]) == [renamed] for name in names[1:])


def test_nested_model_classes() -> None:
    """The class of the whole model renames first, that of its language model afterwards."""
    inner = WeightsMapper(orig_to_new_prefix={"language_model.": "backbone.language_model."})
    original = "model.language_model.layers.0.o_proj"
    (renamed,) = inner.apply_list(PREFIX.apply_list([original]))
    assert original in original_names(renamed, [PREFIX, inner])


def test_a_name_that_nobody_renamed() -> None:
    assert original_names("lm_head", [PREFIX, PART, SUFFIX]) == ["lm_head"]


def test_what_a_mapper_would_not_produce_is_no_original() -> None:
    """`a.` becomes `b.` becomes `c.`: a module `c.x` was never called `b.x` by the checkpoint."""
    mapper = WeightsMapper(orig_to_new_prefix={"a.": "b.", "b.": "c."})
    assert "a.x" not in original_names("b.x", [mapper])


def test_a_draft_model() -> None:
    assert checkpoint_name("draft_model.model.layers.0.mlp") == "model.layers.0.mlp"
    assert checkpoint_name("model.draft_model.mlp") == "model.draft_model.mlp"


@pytest.mark.parametrize(
    ("model_type", "prefix", "name"),
    [
        ("granitemoehybrid", "model.layers.3.mixer.in_proj", "model.layers.3.mamba.in_proj"),
        ("granitemoehybrid", "model.layers.3.self_attn.o_proj", "model.layers.3.self_attn.o_proj"),
        ("lfm2_vl", "language.model.layers.3.w2", "language_model.model.layers.3.w2"),
        (
            "minimax_m2",
            "model.layers.3.mlp.experts",
            "model.layers.3.block_sparse_moe.experts",
        ),
        ("falcon_h1", "model.27.mixer.in_proj", "model.layers.3.mamba.mamba.in_proj"),
        ("falcon_h1", "27.mixer.in_proj", "model.layers.3.mamba.mamba.in_proj"),  # of a draft
        ("falcon_h1", "model.layers.3.qkv_proj", "model.layers.3.self_attn.qkv_proj"),
        ("falcon_h1", "model.layers.3.o_proj", "model.layers.3.self_attn.o_proj"),
        ("falcon_h1", "model.layers.3.feed_forward.w2", "model.layers.3.feed_forward.w2"),
        ("ernie4_5_moe", "model.layers.24.mlp.down_proj", "model.mtp_block.0.mlp.down_proj"),
        ("ernie_mtp", "model.layers.25.mlp.down_proj", "model.mtp_block.1.mlp.down_proj"),
        ("ernie4_5_moe", "model.layers.23.mlp.down_proj", "model.layers.23.mlp.down_proj"),
        ("ernie4_5_moe", "model.norm", "model.norm"),
    ],
)
def test_names_that_vllm_builds_modules_with(model_type: str, prefix: str, name: str) -> None:
    assert NAMINGS[model_type](prefix, PreTrainedConfig(num_hidden_layers=24)) == name
