"""A checkpoint is told from another without reading its weights."""

from pathlib import Path

import pytest

from benchmarks.engines.identity import identity


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"1234")
    return made


def test_checksums_tell_checkpoints_of_one_size_apart(folder: Path) -> None:
    digests = set()
    for sums in ("aa  model.safetensors", "bb  model.safetensors"):
        (folder / "SHA256SUMS").write_text(sums)
        found = identity(folder)
        assert found["name"] == "model"
        digests.add(found["digest"])
    (folder / "README.md").write_text("more")
    assert identity(folder)["digest"] in digests
    assert len(digests) == 2


def test_without_checksums_configuration_and_sizes_do(folder: Path) -> None:
    digests = [identity(folder)["digest"]]
    (folder / "model.safetensors").write_bytes(b"12345")
    digests.append(identity(folder)["digest"])
    (folder / "config.json").write_text("[]")
    digests.append(identity(folder)["digest"])
    assert len(set(digests)) == 3
    (folder / "model.safetensors").write_bytes(b"54321")
    assert identity(folder)["digest"] == digests[-1]
