"""What `config.json` says of 8 bits, in the words of those who publish such models."""

from typing import Any

import pytest

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.quantization_entries import quantization_entries
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.scaled_form import (
    BITMASK,
    MARLIN,
    OF_CACHES_ALONE,
    ScaledForm,
    scaled_form,
    sparse_layout,
)

FINE = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""As Qwen3-30B-A3B-FP8 and DeepSeek-V3 have it."""
STATIC = {"activation_scheme": "static", "quant_method": "fp8", "weight_block_size": None}
"""As Ministral 3 has it."""
FLOAT8 = "float8_e4m3fn"


def groups(*weights: dict[str, Any] | None, **said: object) -> dict[str, Any]:
    """A configuration of compressed-tensors, one group for each kind of weights."""
    entries = {
        f"group_{number}": {"targets": ["Linear"], "weights": one, "output_activations": None}
        for number, one in enumerate(weights)
    }
    common = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return common | {"quantization_status": "compressed", "config_groups": entries} | said


def weights(strategy: str | None, **said: object) -> dict[str, Any]:
    common = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "actorder": None}
    return common | {"strategy": strategy, "group_size": None, "block_structure": None} | said


INTEGERS = weights("group", num_bits=4, type="int", group_size=128)
"""As llm-compressor wrote W4A16 with 2:4 (`marlin-24`)."""


@pytest.mark.parametrize(
    ("entries", "form"),
    [
        (FINE, ScaledForm(FLOAT8, Block(128, 128))),
        (FINE | {"weight_block_size": [64, 32]}, ScaledForm(FLOAT8, Block(64, 32))),
        (STATIC, ScaledForm(FLOAT8, Block(None, None))),
        ({"quant_method": "fp8"}, ScaledForm(FLOAT8, Block(None, None))),
        (groups(weights("tensor")), ScaledForm(FLOAT8, Block(None, None))),
        (groups(weights("channel")), ScaledForm(FLOAT8, Block(1, None))),
        (
            groups(weights("block", block_structure=[128, 128])),
            ScaledForm(FLOAT8, Block(128, 128)),
        ),
        (groups(weights("group", group_size=64)), ScaledForm(FLOAT8, Block(1, 64))),
        (groups(weights("channel"), None, weights("channel")), ScaledForm(FLOAT8, Block(1, None))),
        (
            groups(weights("channel", type="int"), format="int-quantized"),
            ScaledForm("int8", Block(1, None)),
        ),
        (
            groups(weights("channel"), format="naive-quantized", kv_cache_scheme={"num_bits": 8}),
            ScaledForm(FLOAT8, Block(1, None)),
        ),
        (
            groups(weights("channel"), sparsity_config={"format": "dense"}, transform_config={}),
            ScaledForm(FLOAT8, Block(1, None)),
        ),
        (
            groups(weights("block", block_structure="128x64")),
            ScaledForm(FLOAT8, Block(128, 64)),
        ),
        (groups(INTEGERS, format="pack-quantized"), ScaledForm("int8", Block(1, 128), 4)),
        (
            groups(weights("channel", type="int"), format="pack-quantized"),
            ScaledForm("int8", Block(1, None), 8),
        ),
        (groups(weights(None)), ScaledForm(FLOAT8, Block(None, None))),
        (groups(weights(None, group_size=64)), ScaledForm(FLOAT8, Block(1, 64))),
        (groups(weights(None, group_size=-1)), ScaledForm(FLOAT8, Block(1, None))),
        (groups(weights("CHANNEL", type="FLOAT")), ScaledForm(FLOAT8, Block(1, None))),
        (groups({"strategy": "channel"}), ScaledForm("int8", Block(1, None))),
        (groups({}, format="int-quantized"), ScaledForm("int8", Block(None, None))),
        (groups(weights("tensor"), quant_method=None), ScaledForm(FLOAT8, Block(None, None))),
        (groups(weights("tensor"), quant_method="sparseml"), ScaledForm(FLOAT8, Block(None, None))),
        (FINE | {"weight_block_size": [1, 2**31 - 1]}, ScaledForm(FLOAT8, Block(1, 2**31 - 1))),
    ],
)
def test_forms_that_are_read(entries: dict[str, Any], form: ScaledForm) -> None:
    assert scaled_form({"model_type": "llama", "quantization_config": entries}) == form


def test_a_plain_model_has_no_form() -> None:
    assert scaled_form({"model_type": "llama"}) is None
    assert scaled_form({"model_type": "llama", "quantization_config": None}) is None


@pytest.mark.parametrize(
    "entries",
    [
        {},
        {"sparsity_config": {"format": "dense"}},
        {"sparsity_config": {"format": None, "targets": ["Linear"]}},
        {"quant_method": "compressed-tensors", "format": "dense"},
        {"quant_method": "sparseml", "config_groups": {}, "format": "fakequant"},
        {"quant_method": "compressed-tensors", "config_groups": {}, "format": "int-quantized"},
        {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}},
        {"quantization_config": None, "sparsity_config": {"format": "dense"}},
        {"config_groups": None, "kv_cache_scheme": None},
    ],
)
@pytest.mark.parametrize("key", ["quantization_config", "compression_config"])
def test_what_quantizes_nothing_is_a_plain_model(key: str, entries: dict[str, Any]) -> None:
    """As tools leave it that pruned alone, or that were asked for nothing."""
    assert scaled_form({key: entries}) is None
    assert sparse_layout({key: entries}) is None


def test_of_caches_alone_no_weight_is_in_8_bits() -> None:
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    entries = groups(format="dense", kv_cache_scheme=scheme)
    assert scaled_form({"quantization_config": entries}) == OF_CACHES_ALONE
    assert OF_CACHES_ALONE.stored is None


def test_a_checkpoint_of_this_format_has_no_form() -> None:
    config = {"quantization_config": {"quant_method": "permllm"}, "compression_config": FINE}
    assert scaled_form(config) is None
    assert sparse_layout(config) is None


@pytest.mark.parametrize(
    ("entries", "layout"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ({"format": "sparse-bitmask", "sparsity_structure": "2:4"}, "sparse-bitmask"),
        (groups(format="marlin-24"), "marlin-24"),
        (groups(INTEGERS, format="marlin-24"), "marlin-24"),
        (
            groups(INTEGERS, format="marlin-24", sparsity_config={"format": "dense"}),
            "marlin-24",
        ),
        (groups({**INTEGERS}, format="mixed-precision"), None),
        (
            groups(weights("channel"), sparsity_config={"format": "sparse-24-bitmask"}),
            "sparse-24-bitmask",
        ),
        (FINE, None),
        ({"quant_method": "gptq", "format": "gptq_v2"}, None),
    ],
)
def test_weights_without_their_zeros(entries: dict[str, Any], layout: str | None) -> None:
    """Those are no dense model."""
    config = {"compression_config": entries}
    assert sparse_layout(config) == layout
    if layout is not None:
        with pytest.raises(CheckpointError, match=f"format: found '{layout}'; rule: 'dense'"):
            scaled_form(config)


@pytest.mark.parametrize(
    ("entries", "layout", "form"),
    [
        (
            groups(weights("channel"), sparsity_config={"format": BITMASK}),
            BITMASK,
            ScaledForm(FLOAT8, Block(1, None)),
        ),
        ({"sparsity_config": {"format": BITMASK}}, BITMASK, None),
        (groups(INTEGERS, format=MARLIN), MARLIN, ScaledForm("int8", Block(1, 128))),
        (
            groups(INTEGERS | {"strategy": "channel", "group_size": None}, format=MARLIN),
            MARLIN,
            ScaledForm("int8", Block(1, None)),
        ),
        (
            groups(INTEGERS | {"num_bits": 8}, format=MARLIN),
            MARLIN,
            ScaledForm("int8", Block(1, 128)),
        ),
    ],
)
def test_what_is_there_once_the_layout_is_undone(
    entries: dict[str, Any], layout: str, form: ScaledForm | None
) -> None:
    assert scaled_form({"quantization_config": entries}, layout) == form


@pytest.mark.parametrize(
    ("entries", "layout", "message"),
    [
        (groups(weights("channel")), BITMASK, "format: found 'dense'; rule: 'sparse-24-bitmask'"),
        (groups(INTEGERS, format="pack-quantized"), MARLIN, "found 'dense'; rule: 'marlin-24'"),
        (groups(INTEGERS | {"num_bits": 3}, format=MARLIN), MARLIN, "found int of 3 bits; rule: i"),
        (groups(INTEGERS | {"type": "float"}, format=MARLIN), MARLIN, "found float of 4 bits; rul"),
        (groups(INTEGERS | {"symmetric": False}, format=MARLIN), MARLIN, "symmetric: found false"),
        (groups(INTEGERS | {"strategy": "tensor"}, format=MARLIN), MARLIN, "rule: channel or gro"),
        (
            {
                **groups(INTEGERS, format="mixed-precision"),
                "config_groups": {
                    "group_0": {"weights": INTEGERS, "format": MARLIN},
                    "group_1": {"weights": INTEGERS, "format": "pack-quantized"},
                },
            },
            MARLIN,
            "group_1.format: found 'pack-quantized'; rule: 'marlin-24', as of other groups",
        ),
        (
            groups(INTEGERS, format="pack-quantized", sparsity_config={"format": BITMASK}),
            BITMASK,
            "found 'pack-quantized'; rule: weights of 8 bits each, with 'sparse-24-bitmask'",
        ),
    ],
)
def test_other_forms_in_a_layout_are_refused(
    entries: dict[str, Any], layout: str, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        scaled_form({"quantization_config": entries}, layout)


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({"quantization_config": FINE}, "quantization_config"),
        ({"compression_config": FINE}, "compression_config"),
        ({"text_config": {"quantization_config": FINE}}, "text_config.quantization_config"),
        (
            {"quantization_config": None, "text_config": {"compression_config": FINE}},
            "text_config.compression_config",
        ),
        (
            {"quantization_config": FINE, "text_config": {"quantization_config": STATIC}},
            "quantization_config",
        ),
        (
            {"compression_config": {"quantization_config": FINE, "quant_method": "other"}},
            "compression_config.quantization_config",
        ),
        ({"text_config": [FINE], "compression_config": FINE}, "compression_config"),
    ],
)
def test_it_is_found_wherever_publishers_write_it(config: dict[str, Any], path: str) -> None:
    found = quantization_entries(config)
    assert found is not None
    assert found.entries == FINE
    assert found.path == path


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"compression_config": "x"}, "config.json compression_config: found 'x'; rule: a JSON"),
        ({"quantization_config": [FINE]}, r"config.json quantization_config: found \[\{'activ"),
        (
            {"text_config": {"compression_config": {"quant_method": "gptq"}}},
            "config.json text_config.compression_config.quant_method: found 'gptq'",
        ),
        (
            {"compression_config": {"quantization_config": groups(weights("row"))}},
            "compression_config.quantization_config.config_groups.group_0.weights.strategy: found",
        ),
        (
            {"compression_config": {"quantization_config": 7}},
            "_config.quantization_config: found 7",
        ),
    ],
)
def test_a_problem_names_where_it_is_said(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scaled_form(config)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        (7, "quantization_config: found 7; rule: a JSON object"),
        ({"load_in_8bit": True}, "quant_method: found None; rule: read are 'permllm', and 8 bits"),
        ({"quant_method": ["fp8"]}, r"quant_method: found \['fp8'\]"),
        (groups() | {"config_groups": [weights("tensor")]}, r"config_groups: found \[\{'num_bits'"),
        (groups() | {"config_groups": {"group_0": 7}}, "config_groups.group_0: found 7; rule: a J"),
        (
            groups() | {"config_groups": {"FP8_DYNAMIC": ["Linear"]}},
            r"config_groups.FP8_DYNAMIC: found \['Linear'\]; rule: a JSON object",
        ),
        (groups(7), "group_0.weights: found 7; rule: a JSON object"),  # type: ignore[arg-type]
        (groups(weights(["tensor"])), "strategy: found"),  # type: ignore[arg-type]
        (groups(weights("tensor", type=["float"])), "of 8 bits; rule"),
        ({"quant_method": "gptq", "bits": 4}, "quant_method: found 'gptq'"),
        ({"quant_method": "awq"}, "found 'awq'; rule: .*; remedy: give the model from before"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "found 'bitsandbytes'"),
        ({"quant_method": "mxfp4"}, "found 'mxfp4'"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "found 'modelopt'"),
        (FINE | {"weight_block_size": [2**70, 1]}, r"whole numbers from 1 to 2147483647, of rows"),
        (FINE | {"weight_block_size": [1, 2**31]}, r"found \[1, 2147483648\]; rule: two whole"),
        (FINE | {"weight_block_size": [128]}, r"weight_block_size: found \[128\]; rule: two whole"),
        (FINE | {"weight_block_size": [128, 0]}, r"weight_block_size: found \[128, 0\]"),
        (FINE | {"weight_block_size": [128, True]}, r"weight_block_size: found \[128, True\]"),
        (FINE | {"weight_block_size": 128}, "weight_block_size: found 128"),
        (groups(None), "config_groups: found no weights; rule: weights of 8 bits, all in one form"),
        (groups(weights("channel", num_bits=4, type="int")), "found int of 4 bits; rule: float or"),
        (groups(weights("channel"), format="pack-quantized"), "float of 8 bits; rule: int of 4 or"),
        (groups(INTEGERS | {"num_bits": 3}, format="pack-quantized"), "found int of 3 bits; rule"),
        (groups(INTEGERS | {"symmetric": False}, format="pack-quantized"), "symmetric: found fal"),
        (groups(weights("channel"), format="mxfp4-pack-quantized"), "found 'mxfp4-pack-quanti"),
        (groups(weights("tensor"), format="nvfp4-pack-quantized"), "found 'nvfp4-pack-quantized'"),
        (groups(weights("channel"), format=None), "format: found None"),
        (groups(weights("channel", symmetric=False)), "symmetric: found false; rule: true"),
        (groups(weights("token")), "group_0.weights.strategy: found 'token'; rule: tensor, chan"),
        (groups(weights(None, group_size=[4])), r"group_0.weights.group_size: found \[1, \[4\]\]"),
        (
            groups(weights("block", block_structure="128x1x1")),
            "group_0.weights.block_structure: found '128x1x1'",
        ),
        (
            groups(weights("block", block_structure="9" * 5000 + "x1")),
            "group_0.weights.block_structure: found '9999",
        ),
        (groups(weights("block")), "group_0.weights.block_structure: found None"),
        (groups(weights("group")), r"group_0.weights.group_size: found \[1, None\]"),
        (
            groups(weights("tensor"), weights("channel")),
            r"blocks of \[None, None\] and float8_e4m3fn in blocks of \[1, None\]; rule: .* one",
        ),
        (
            groups(weights("channel"), sparsity_config={"format": "sparse-24-bitmask"}),
            "sparsity_config.format: found 'sparse-24-bitmask'; rule: 'dense'",
        ),
        (
            groups(weights("channel"), transform_config={"config_groups": {"u": {}}}),
            "transform_config: found transforms of weights",
        ),
    ],
)
def test_other_quantizations_are_refused(entries: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scaled_form({"model_type": "llama", "quantization_config": entries})


def test_of_a_mixed_checkpoint_the_format_of_the_group_counts() -> None:
    mixed = groups(weights("channel"), format="mixed-precision")
    mixed["config_groups"]["group_0"]["format"] = "float-quantized"
    assert scaled_form({"quantization_config": mixed}) == ScaledForm(FLOAT8, Block(1, None))
    mixed["config_groups"]["group_0"]["format"] = "nvfp4-pack-quantized"
    with pytest.raises(CheckpointError, match="found 'nvfp4-pack-quantized'"):
        scaled_form({"quantization_config": mixed})
