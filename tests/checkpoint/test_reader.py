import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader, SparseLayer


@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int8", "int4"])
def test_the_dense_model_comes_back(
    make_tiny_model: Callable[[str, str], Any], tmp_path: Path, pattern: str, dtype: str
) -> None:
    model = make_tiny_model(pattern, dtype)
    reader = CheckpointReader(model.write(tmp_path / "out", max_shard_bytes=20_000))
    assert reader.quantization == model.quantization
    assert set(reader.names()) == set(model.tensors)
    dense = dict(reader.dense_state_dict())
    assert dense.keys() == model.dense.keys()
    for name, tensor in model.dense.items():
        assert dense[name].dtype == tensor.dtype
        assert torch.equal(dense[name], tensor), name
    half = dict(reader.dense_state_dict(torch.float16))
    assert {tensor.dtype for tensor in half.values()} == {torch.float16}


def test_layers_hold_what_was_written(tiny_model: Any, tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_model.write(tmp_path / "out"))
    assert reader.sparse_layers() == [
        f"model.layers.{i}.{kind}"
        for i in range(2)
        for kind in ("mlp.down_proj", "mlp.up_proj", "self_attn.o_proj")
    ]
    name = "model.layers.0.mlp.up_proj"
    layer = reader.layer(name)
    assert (layer.out_features, layer.in_features) == (128, 64)
    for kind, tensor in {
        "weight_packed": layer.values,
        "weight_mask": layer.mask,
        "input_permutation": layer.input_permutation,
        "bias": layer.bias,
    }.items():
        assert tensor is not None
        assert torch.equal(tensor, tiny_model.tensors[f"{name}.{kind}"])
        assert reader.header(f"{name}.{kind}").shape == tuple(tensor.shape)
    assert layer.folded_permutation is None
    assert layer.scale is None
    assert reader.layer("model.layers.0.mlp.down_proj").folded_permutation is not None


def test_layers_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    names = [f"layers.{i}.{kind}.weight" for i in range(12) for kind in ("fc1", "fc2")]
    (tmp_path / "config.json").write_text("{}")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "model.safetensors")
    reader = CheckpointReader(tmp_path)
    assert reader.names() == names
    assert reader.quantization is None
    assert reader.sparse_layers() == []
    assert [name for name, _ in reader.dense_state_dict()] == names


def test_what_is_not_there_is_named(tiny_model: Any, tmp_path: Path) -> None:
    reader = CheckpointReader(tiny_model.write(tmp_path / "out"))
    with pytest.raises(CheckpointError, match=r"nothing\.weight: found nothing in .*names\(\)"):
        reader.tensor("nothing.weight")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight_packed.*sparse_layers\(\)"):
        reader.layer("lm_head")
    with pytest.raises(CheckpointError, match=r"absent.config\.json: found nothing"):
        CheckpointReader(tmp_path / "absent")


def test_a_missing_companion_is_named(tiny_model: Any, tmp_path: Path) -> None:
    output = tiny_model.write(tmp_path / "out")
    name = "model.layers.0.mlp.up_proj"
    del tiny_model.tensors[f"{name}.weight_mask"]
    save_file(tiny_model.tensors, output / "model.safetensors")
    reader = CheckpointReader(output)
    with pytest.raises(CheckpointError, match=rf"{name}\.weight_mask: found nothing"):
        reader.layer(name)
    assert reader.layer("model.layers.1.mlp.up_proj").out_features == 128


def test_a_foreign_quantization_is_refused(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="quantization_config: found awq; rule"):
        CheckpointReader(tmp_path)


def test_bad_contents_are_refused_when_decompressed() -> None:
    layer = SparseLayer(
        values=torch.ones(2, 32),
        mask=torch.full((2, 8), 0b00110011, dtype=torch.uint8),
        input_permutation=torch.arange(64, dtype=torch.uint8),
        name="up",
    )
    assert layer.dense(Pattern(2, 4), 64).sum() == 64
    layer.mask[1, 3] = 0b01110001
    with pytest.raises(CheckpointError, match=r"up\.weight_mask: found 1 bits in row 1, group 6"):
        layer.dense(Pattern(2, 4), 64)
    layer.mask[1, 3] = 0b00110011
    assert layer.input_permutation is not None
    layer.input_permutation[5] = 6
    with pytest.raises(CheckpointError, match=r"up\.input_permutation.*no bijection in block 0"):
        layer.dense(Pattern(2, 4), 64)
