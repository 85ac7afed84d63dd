import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from permllm_vllm.checkpoint import shards
from permllm_vllm.checkpoint.checksums import checksum_problems, read_checksums
from permllm_vllm.checkpoint.errors import CheckpointError

SHARD_BYTES = 20_000


@pytest.fixture
def checkpoint(tiny_model: Any, tmp_path: Path) -> Path:
    return tiny_model.write(tmp_path / "out", max_shard_bytes=SHARD_BYTES)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.safetensors"))


def test_the_writer_records_every_shard(checkpoint: Path) -> None:
    recorded = read_checksums(checkpoint)
    assert recorded is not None
    assert sorted(recorded) == names(checkpoint)
    assert len(recorded) >= 3
    seen: list[int] = []
    assert checksum_problems(checkpoint, recorded, seen.append) == []
    assert sum(seen) == sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="sha256sum is not installed")
def test_sha256sum_agrees(checkpoint: Path) -> None:
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    subprocess.run(command, cwd=checkpoint, check=True)


def test_a_changed_a_missing_and_an_unrecorded_file_are_named(checkpoint: Path) -> None:
    changed, missing, *_ = names(checkpoint)
    content = bytearray((checkpoint / changed).read_bytes())
    content[-1] ^= 1
    (checkpoint / changed).write_bytes(content)
    (checkpoint / missing).unlink()
    problems = checksum_problems(checkpoint, [*names(checkpoint), "more.safetensors"])
    assert [problem.tensor for problem in problems] == [changed, missing, "more.safetensors"]
    assert "its content changed" in str(problems[0])
    assert "cannot be read" in str(problems[1])
    assert "no recorded SHA-256" in str(problems[2])


def test_without_a_record_there_is_nothing_to_compare(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").unlink()
    assert read_checksums(checkpoint) is None
    assert checksum_problems(checkpoint, names(checkpoint)) == []


@pytest.mark.parametrize(
    "line",
    [
        "0" * 64 + "  ../outside.safetensors",
        "0" * 64 + "  /etc/passwd",
        "0" * 64 + "  .hidden.safetensors",
        "0" * 64 + "  \x1b[2J.safetensors",
        "0" * 64 + "  a.safetensors\n" + "1" * 64 + "  a.safetensors",
        "0" * 63 + "  model.safetensors",
        "nonsense",
    ],
)
def test_a_line_that_is_no_record_is_refused(checkpoint: Path, line: str) -> None:
    (checkpoint / "SHA256SUMS").write_text(line + "\n")
    with pytest.raises(CheckpointError, match="plain name"):
        read_checksums(checkpoint)
    (problem,) = checksum_problems(checkpoint, names(checkpoint))
    assert problem.tensor == "SHA256SUMS"


def test_binary_garbage_is_reported(checkpoint: Path) -> None:
    (checkpoint / "SHA256SUMS").write_bytes(b"\xff\xfe\x00")
    (problem,) = checksum_problems(checkpoint, names(checkpoint))
    assert "cannot be read" in str(problem)


def test_a_record_of_any_size_is_not_read(checkpoint: Path) -> None:
    with mock.patch.object(shards, "LARGEST_JSON", 100):
        (problem,) = checksum_problems(checkpoint, names(checkpoint))
    assert "at most 100 are read" in str(problem)


def test_what_leads_elsewhere_is_not_read(checkpoint: Path, tmp_path: Path) -> None:
    """A link out of the directory, and a pipe that would be waited for."""
    outside, pipe, *_ = names(checkpoint)
    shutil.move(checkpoint / outside, tmp_path / "outside")
    os.symlink(tmp_path / "outside", checkpoint / outside)
    (checkpoint / pipe).unlink()
    os.mkfifo(checkpoint / pipe)
    first, second = checksum_problems(checkpoint, names(checkpoint))
    assert "a link to" in str(first)
    assert "no regular file" in str(second)
