"""What `config.json` says of weights that are not plain numbers, and what is refused for it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.stored_otherwise import StoredOtherwise, stored_otherwise

CT = {"quant_method": "compressed-tensors"}
GROUPS = {"config_groups": {"g": {"weights": {"num_bits": 8}}}}
BITMASK = {"sparsity_config": {"format": "sparse-24-bitmask"}}
OF_GROUPS = StoredOtherwise("compressed-tensors", "dense")


@pytest.mark.parametrize(
    "entries",
    [
        None,
        {},
        {"quant_method": "permllm"},
        {**CT, "format": "dense", "ignore": ["lm_head"]},
        {**CT, "config_groups": {}, "format": "pack-quantized"},
        {**CT, "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"}},
        {"sparsity_config": {"format": "dense"}, "format": "fakequant", "quant_method": "sparseml"},
        {**CT, "kv_cache_scheme": {"num_bits": 8}},
    ],
)
def test_plain_numbers(entries: object) -> None:
    assert stored_otherwise({"quantization_config": entries}) is None


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"quant_method": "gptq", "bits": 4}, StoredOtherwise("gptq", "dense")),
        ({"bits": 4}, StoredOtherwise("None", "dense")),
        ({"quant_method": "fp8"}, StoredOtherwise("fp8", "dense")),
        ({**CT, **GROUPS}, OF_GROUPS),
        (GROUPS, OF_GROUPS),
        ({**CT, "transform_config": {"config_groups": {"u": {}}}}, OF_GROUPS),
        ({**CT, **BITMASK}, StoredOtherwise("", "sparse-24-bitmask")),
        ({**CT, "format": "sparse-24-bitmask"}, StoredOtherwise("", "sparse-24-bitmask")),
        ({**CT, **GROUPS, **BITMASK}, OF_GROUPS._replace(layout="sparse-24-bitmask")),
        ({**CT, "format": "marlin-24"}, StoredOtherwise("", "marlin-24")),
        ({**CT, **GROUPS, "format": "marlin-24"}, OF_GROUPS._replace(layout="marlin-24")),
        ({"quantization_config": {**CT, **GROUPS}, "global_compression_ratio": 2}, OF_GROUPS),
    ],
)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_what_is_said(entries: dict[str, Any], expected: StoredOtherwise, place: str) -> None:
    config = {place: entries}
    if place == "text_config":
        config = {"text_config": {"quantization_config": entries}}
    assert stored_otherwise(config) == expected


@pytest.mark.parametrize(
    "entries", [[], 7, {**CT, "config_groups": ["g"]}, {**CT, "sparsity_config": "dense"}]
)
def test_entries_that_are_no_objects_are_refused(entries: object) -> None:
    with pytest.raises(CheckpointError, match="rule: a JSON object"):
        stored_otherwise({"quantization_config": entries})


def write(place: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    save_file(tensors, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps(config))
    return place


@pytest.mark.parametrize(
    ("entries", "remedy"),
    [
        ({"quant_method": "awq"}, "give the model from before its quantization"),
        ({**CT, **GROUPS}, "by `permllm-offline convert --to dense`"),
        ({**CT, **BITMASK}, "make it a checkpoint of this format by `permllm-offline convert`"),
        ({**CT, **GROUPS, **BITMASK}, "give the model from before its quantization"),
    ],
)
def test_a_reader_says_what_to_do(entries: dict[str, Any], remedy: str, tmp_path: Path) -> None:
    write(tmp_path, {"quantization_config": entries}, w=torch.zeros(1))
    with pytest.raises(CheckpointError, match=f"rule: weights are stored as plain .*{remedy}"):
        CheckpointReader(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "read"),
    [
        ("up.weight", torch.int8, False),
        ("up.weight", torch.float8_e4m3fn, False),
        ("mlp.experts.down_proj", torch.uint8, False),
        ("up.scales", torch.float8_e5m2, False),
        ("up.positions", torch.int8, True),
        ("up.weight", torch.bfloat16, True),
    ],
)
def test_weights_of_8_bits_stand_for_nothing(
    name: str, dtype: torch.dtype, read: bool, tmp_path: Path
) -> None:
    reader = CheckpointReader(write(tmp_path, {}, **{name: torch.zeros(2, 2).to(dtype)}))
    if read:
        assert reader.tensor(name).dtype == dtype
        return
    with pytest.raises(CheckpointError, match=rf"{name}: found .*; rule: weights of 16 or 32 bits"):
        reader.tensor(name)
