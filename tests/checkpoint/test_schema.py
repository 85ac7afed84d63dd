from typing import Any

import pytest
import torch

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern
from permllm_vllm.checkpoint.schema import QuantizationConfig

VALID: dict[str, Any] = {
    "quant_method": "permllm",
    "format_version": 1,
    "pattern": "2:4",
    "block_size": 64,
    "value_dtype": "bfloat16",
    "ignore": ["lm_head", r"re:model\.layers\.\d+\.mlp\.gate"],
    "runtime_permuted": ["model.layers.0.self_attn.q_proj"],
    "folded": ["model.layers.0.mlp.down_proj"],
    "tool_version": "0.1.0",
}


def test_a_config_comes_back_as_written() -> None:
    config = QuantizationConfig.from_dict(VALID)
    assert config.to_dict() == VALID
    assert QuantizationConfig.from_dict(config.to_dict()) == config


def test_the_constants_are_what_the_model_takes() -> None:
    config = QuantizationConfig(pattern="2:4", block_size=64, value_dtype="int8")
    assert config.quant_method == schema.QUANT_METHOD
    assert config.format_version == 1
    assert config.tool_version == schema.installed_version()


def test_the_version_is_the_oldest_that_has_the_values() -> None:
    for value_dtype in schema.VALUE_DTYPES:
        entries = {**VALID, "value_dtype": value_dtype}
        of_int4 = value_dtype == "int4"
        assert QuantizationConfig.from_dict({**entries, "format_version": 1 + of_int4})
        with pytest.raises(CheckpointError, match=f"format_version is {2 - of_int4}, but"):
            QuantizationConfig.from_dict({**entries, "format_version": 2 - of_int4})
        del entries["format_version"]
        assert QuantizationConfig.model_validate(entries).format_version == 1 + of_int4


def test_ignore_takes_names_and_full_regexes() -> None:
    config = QuantizationConfig.from_dict(VALID)
    assert config.is_ignored("lm_head")
    assert config.is_ignored("model.layers.11.mlp.gate")
    assert not config.is_ignored("model.layers.11.mlp.gate_proj")
    assert not config.is_ignored("xmodel.layers.11.mlp.gate")
    assert not config.is_ignored("lm_head.extra")
    dotted = QuantizationConfig.from_dict({**VALID, "ignore": ["a.b"]})
    assert not dotted.is_ignored("axb")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "gptq"}, r"quant_method: found 'gptq'.*permllm-offline prune"),
        ({"format_version": 3}, r"format_version: found 3.*install a newer permllm-vllm from"),
        ({"format_version": 0}, r"format_version: found 0.*write the checkpoint again"),
        ({"format_version": "1"}, r"format_version: found '1'"),
        ({"format_version": True}, r"format_version: found True"),
        ({"format_version": 1.0}, r"format_version: found 1.0"),
        (
            {"sparsity_config": {}},
            r"sparsity_config.*does not know.*install a newer permllm-",
        ),
        ({"pattern": "1:4"}, r"pattern: found '1:4'.*use one of 2:4, 4:8, 8:16, 32:64"),
        ({"block_size": 48}, r"block_size: found 48.*one of 32, 64, 128"),
        ({"block_size": "64"}, r"block_size: found '64'"),
        ({"value_dtype": "float8"}, r"value_dtype: found 'float8'.*'bfloat16'"),
        ({"ignore": "lm_head"}, r"ignore: found 'lm_head'"),
        ({"ignore": ["re:("]}, r"'re:\(' is no regular expression.*unclosed group"),
        ({"ignore": ["re:" + "(" * 250]}, "is no regular expression"),
        ({"ignore": ["re:a{99999999999999999999}"]}, "is no regular expression"),
        ({"ignore": ["re:a)|(?:b"]}, "is no regular expression"),
        ({"ignore": ["re:(?=a)a"]}, "no look-around"),
        ({"ignore": ["re:" + "a" * 301]}, "301 characters; at most 300"),
        ({"ignore": [f"re:{i}" for i in range(101)]}, "101 regular expressions; at most 100"),
        ({"folded": ["a", "a"]}, r"'a' is listed twice"),
        ({"absent": ["a", "a"]}, r"'a' is listed twice"),
        ({"folded": ["model.layers.0.self_attn.q_proj"]}, r"never both"),
    ],
)
def test_bad_configs_say_what_to_do(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        QuantizationConfig.from_dict({**VALID, **change})


@pytest.mark.parametrize("pattern", SUPPORTED)
def test_every_pattern_is_read_and_written(pattern: str) -> None:
    """In the same version of the format: a reader that does not know one names those it knows."""
    entries = {**VALID, "pattern": pattern}
    assert QuantizationConfig.from_dict(entries).to_dict() == entries


@pytest.mark.parametrize("key", [key for key in VALID if key not in ("quant_method",)])
def test_every_key_is_needed(key: str) -> None:
    with pytest.raises(CheckpointError, match=key):
        QuantizationConfig.from_dict({k: v for k, v in VALID.items() if k != key})


def test_what_no_layer_lacks_is_not_written() -> None:
    """So that checkpoints of most models are as they were before there was the key."""
    absent = {"absent": ["model.layers.1.self_attn.v_proj"]}
    assert QuantizationConfig.from_dict(VALID | absent).to_dict() == VALID | absent
    assert QuantizationConfig.from_dict(VALID | {"absent": []}).to_dict() == VALID


def test_every_problem_is_listed() -> None:
    with pytest.raises(CheckpointError) as refusal:
        QuantizationConfig.from_dict({**VALID, "block_size": 7, "pattern": "x", "extra": 1})
    for key in ("block_size", "pattern", "extra"):
        assert f"quantization_config.{key}" in str(refusal.value)
    assert schema.config_problems([])[0].value == "list"


def test_shapes_and_dtypes_of_a_layer() -> None:
    shape = {
        kind: schema.tensor_shape(kind, 12, 64, Pattern(2, 4), "int8")
        for kind in (*schema.SPARSE_KINDS, schema.BIAS)
    }
    assert shape == {
        "weight_packed": (12, 32),
        "weight_mask": (12, 8),
        "input_permutation": (64,),
        "folded_permutation": (64,),
        "weight_scale": (12,),
        "weight_multiplier": (12, 1),
        "bias": (12,),
    }
    assert schema.tensor_dtype("weight_packed", "int8") == torch.int8
    assert schema.tensor_dtype("weight_mask", "int8") == torch.uint8
    assert schema.tensor_dtype("bias", "int8") is None
