"""A conversion writes files of about one decoder layer, which is what it holds in memory."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from permllm_offline.conversion import shard_size
from permllm_offline.conversion.shard_size import shard_bytes
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_vllm.checkpoint.validation import validate
from tests.conversion.sparse_models import block_orders, load_all, prune, same_weights

MB = 1_000_000


def test_a_small_model_stays_one_file() -> None:
    assert shard_bytes({"embed.weight": 900 * MB, "layers.0.a.weight": 400 * MB}, "layers.") == (
        500 * MB
    )
    assert shard_bytes({}, "layers.") == 500 * MB


def test_a_file_holds_the_largest_decoder_layer() -> None:
    sizes = {"embed.weight": 900 * MB, "layers.1.a.weight": 300 * MB, "layers.1.b": 250 * MB}
    sizes |= {"layers.10.a.weight": 510 * MB, "layers.2.a.weight": 100 * MB}
    assert shard_bytes(sizes, "layers.") == 550 * MB


def test_shards_of_a_decoder_layer_by_default(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_size, "SMALLEST_SHARD_BYTES", 1)
    source, out, back = (tmp_path / name for name in ("source", "out", "back"))
    prune(dense, source, block_orders())
    layers = {name: one for name, one in load_all(source).items() if ".layers.0." in name}
    layer = sum(tensor.nbytes for tensor in layers.values())
    convert_to_sparse(str(source), out)
    convert_to_dense(str(out), back)
    assert validate(out) == []
    assert same_weights(source, back)
    for folder in (out, back):
        files = [load_file(file).values() for file in folder.glob("model-*.safetensors")]
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in files]
        assert len(sizes) > 1
        assert max(sizes) <= layer
    convert_to_dense(str(out), tmp_path / "one", max_shard_bytes=10 * MB)
    assert (tmp_path / "one" / "model.safetensors").exists()
