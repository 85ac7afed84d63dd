import ctypes
from unittest import mock

import psutil
import pytest
import torch

from permllm_vllm.quantization import served
from permllm_vllm.quantization.served import release_freed_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has none")
def test_what_lies_freed_inside_the_heap_is_returned() -> None:
    process = psutil.Process()
    # Pieces that malloc takes from its heap, held down by a few that stay.
    pieces = [torch.ones(16 * 1024) for _ in range(2049)]
    kept = pieces[::256]
    pieces.clear()
    before = process.memory_info().rss
    release_freed_memory()
    assert before - process.memory_info().rss > 64 * 2**20
    assert all(piece.all() for piece in kept)


def test_a_library_without_it_is_left_alone() -> None:
    with mock.patch.object(served.ctypes, "CDLL", return_value=object()):
        release_freed_memory()
