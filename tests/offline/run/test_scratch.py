import errno
import os
import resource
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from permllm_offline.errors import OfflineError
from permllm_offline.run import scratch
from permllm_offline.run.scratch import CHUNK_BYTES, MEMORY, SHARING, Scratch


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_array_in_a_file_is_one_like_any_other(dtype: torch.dtype, tmp_path: Path) -> None:
    array, in_memory = Scratch(tmp_path).zeros((3, 5), dtype), MEMORY.zeros((3, 5), dtype)
    assert torch.equal(array, in_memory)
    assert array.dtype == dtype
    array += torch.arange(15).view(3, 5)
    assert array.sum() == 105


def test_a_file_has_no_name_and_takes_its_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated = []
    original = os.posix_fallocate

    def recording(descriptor: int, offset: int, size: int) -> None:
        assert list(tmp_path.iterdir()) == []
        original(descriptor, offset, size)
        allocated.append((offset, size, os.fstat(descriptor).st_blocks * 512 >= size))

    monkeypatch.setattr(os, "posix_fallocate", recording)
    array = Scratch(tmp_path).zeros((1 << 22, 2), torch.float32)
    assert allocated == [(0, 8 << 22, True)]
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert f"{tmp_path}/scratch-" in mapped.read_text()
    del array
    if mapped.exists():
        assert f"{tmp_path}/scratch-" not in mapped.read_text()


def test_more_arrays_than_a_process_may_have_files_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuning keeps six for each linear: more than a thousand of a small model."""
    monkeypatch.setattr(scratch, "CHUNK_BYTES", 64)  # a file for each array
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, usual[1]))
    try:
        arrays = [Scratch(tmp_path).zeros((2,), torch.float32) for _ in range(600)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    for number, array in enumerate(arrays):
        array += number
    assert [int(array[0]) for array in arrays] == list(range(600))


@pytest.mark.parametrize("size", [4, 5, CHUNK_BYTES // 16, CHUNK_BYTES // 8, CHUNK_BYTES])
def test_arrays_have_no_bytes_in_common(tmp_path: Path, size: int) -> None:
    place = Scratch(tmp_path)
    arrays = [place.zeros((size,), torch.uint8) for _ in range(3)]
    arrays += [place.zeros((3,), dtype) for dtype in (torch.float64, torch.bfloat16)]
    for number, array in enumerate(arrays, start=1):
        array += number
    for number, array in enumerate(arrays, start=1):
        assert bool((array == number).all())


def test_small_arrays_share_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = tempfile.mkstemp
    monkeypatch.setattr(tempfile, "mkstemp", lambda **names: made.append(1) or original(**names))
    place = Scratch(tmp_path)
    arrays = [place.zeros((CHUNK_BYTES // SHARING,), torch.uint8) for _ in range(40)]
    assert len(made) == 3
    save_file({str(at): one for at, one in enumerate(arrays)}, tmp_path / "arrays.safetensors")


def test_a_number_is_an_array_too(tmp_path: Path) -> None:
    assert Scratch(tmp_path).zeros((), torch.float32).shape == ()


def test_nothing_needs_no_file(tmp_path: Path) -> None:
    assert Scratch(tmp_path / "absent").zeros((0, 4), torch.float32).shape == (0, 4)


def test_a_full_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OfflineError, match=r"No space left.*--scratch memory"):
        Scratch(tmp_path).zeros((4,), torch.float32)
    assert list(tmp_path.iterdir()) == []
