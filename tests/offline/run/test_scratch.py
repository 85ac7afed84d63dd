import errno
import os
import resource
from pathlib import Path

import pytest
import torch

from permllm_offline.errors import OfflineError
from permllm_offline.run.scratch import MEMORY, Scratch


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
    array = Scratch(tmp_path).zeros((1 << 18, 2), torch.float32)
    assert allocated == [(0, 8 << 18, True)]
    mapped = Path("/proc/self/maps")
    if mapped.exists():
        assert f"{tmp_path}/scratch-" in mapped.read_text()
    del array
    if mapped.exists():
        assert f"{tmp_path}/scratch-" not in mapped.read_text()


def test_more_arrays_than_a_process_may_have_files_open(tmp_path: Path) -> None:
    """Tuning keeps six for each linear: more than a thousand of a small model."""
    usual = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, usual[1]))
    try:
        arrays = [Scratch(tmp_path).zeros((2,), torch.float32) for _ in range(600)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, usual)
    for number, array in enumerate(arrays):
        array += number
    assert [int(array[0]) for array in arrays] == list(range(600))


def test_arrays_have_no_bytes_in_common(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    one, other = scratch.zeros((4,), torch.float32), scratch.zeros((4,), torch.float32)
    one += 1
    assert not other.any()


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
