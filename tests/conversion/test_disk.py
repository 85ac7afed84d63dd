"""A conversion checks the free disk before it writes, in files of about a decoder layer."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from safetensors.torch import load_file

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import Values, convert_to_sparse
from permllm_offline.forecast import memory
from permllm_vllm.checkpoint import writer
from permllm_vllm.checkpoint.errors import CheckpointError
from tests.conversion.sparse_models import load_all, prune, same_weights

Usage = namedtuple("Usage", "total used free")


def weight_bytes(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def test_every_conversion_needs_room(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prune(dense, tmp_path / "source")
    sparse, int8, back = (tmp_path / name for name in ("sparse", "int8", "back"))

    def free(count: int) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, count))

    free(10)
    with pytest.raises(CheckpointError, match=r"0\.00 MB free and what is written may take"):
        convert_to_sparse(str(source), sparse)
    assert list(tmp_path.iterdir()) == [source]
    free(10**12)
    convert_to_sparse(str(source), sparse)
    convert_to_sparse(str(sparse), int8, values="int8")
    # Room for the source, not for the dense model.
    free((weight_bytes(sparse) + weight_bytes(source)) // 2)
    with pytest.raises(CheckpointError, match="free and what is written may take"):
        convert_to_dense(str(sparse), back)
    # Values of half the bytes need less room than the source takes, and not much less.
    free(weight_bytes(int8) * 9 // 10)
    with pytest.raises(CheckpointError, match="free and what is written may take"):
        convert_to_sparse(str(sparse), back, values="int8")
    assert not back.exists()
    free((weight_bytes(int8) + weight_bytes(sparse)) // 2)
    convert_to_sparse(str(sparse), back, values="int8")


@pytest.mark.parametrize("values", ["auto", "int8"])
def test_what_is_asked_for_is_what_is_written(
    values: Values, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, asked = prune(dense, tmp_path / "source"), tmp_path / "out", []
    monkeypatch.setattr(writer, "check_disk", lambda _, total: asked.append(total))
    convert_to_sparse(str(source), output, values=values)
    assert asked == [sum(tensor.nbytes for tensor in load_all(output).values())]


def test_shards_of_a_decoder_layer_by_default(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "SMALLEST_SHARD_BYTES", 1)
    source = prune(dense, tmp_path / "source")
    out, int8, back = (tmp_path / name for name in ("out", "int8", "back"))
    layers = {name: one for name, one in load_all(source).items() if ".layers.0." in name}
    layer = sum(tensor.nbytes for tensor in layers.values())
    convert_to_sparse(str(source), out)
    convert_to_sparse(str(out), int8, values="int8")
    convert_to_dense(str(out), back)
    assert same_weights(source, back)
    for folder in (out, int8, back):
        files = [load_file(file).values() for file in folder.glob("model-*.safetensors")]
        sizes = [sum(tensor.nbytes for tensor in tensors) for tensors in files]
        assert len(sizes) > 1
        assert max(sizes) <= layer
    convert_to_dense(str(out), tmp_path / "one", max_shard_bytes=10_000_000)
    assert (tmp_path / "one" / "model.safetensors").exists()


def test_a_file_holds_the_largest_decoder_layer() -> None:
    sizes = {"embed.weight": 900, "layers.1.a.weight": 300, "layers.1.b": 250}
    sizes |= {"layers.10.a.weight": 510, "layers.2.a.weight": 100}
    million = {name: size * 10**6 for name, size in sizes.items()}
    assert memory.converted_shard_bytes(million, "layers.") == 550 * 10**6
    assert memory.converted_shard_bytes({}, "layers.") == 500 * 10**6
