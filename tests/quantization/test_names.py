"""vLLM's names of modules are taken back to those of the checkpoint."""

import pytest
from vllm.model_executor.models.utils import WeightsMapper

from permllm_vllm.quantization.names import checkpoint_name, original_names

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
