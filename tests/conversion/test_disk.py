"""A conversion checks the free disk before it writes, by the size of what it will write."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import Values, convert_to_sparse
from permllm_vllm.checkpoint import writer
from permllm_vllm.checkpoint.errors import CheckpointError
from tests.conversion.sparse_models import OrderOf, block_orders, in_place, load_all, prune

Usage = namedtuple("Usage", "total used free")


def weight_bytes(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def test_every_conversion_needs_room(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = prune(dense, tmp_path / "source", block_orders())
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
@pytest.mark.parametrize("order_of", [block_orders(), in_place], ids=["permuted", "in place"])
def test_what_is_asked_for_is_what_is_written(
    values: Values, order_of: OrderOf, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, output, asked = prune(dense, tmp_path / "source", order_of), tmp_path / "out", []
    monkeypatch.setattr(writer, "check_disk", lambda _, total: asked.append(total))
    convert_to_sparse(str(source), output, values=values)
    assert asked == [sum(tensor.nbytes for tensor in load_all(output).values())]
