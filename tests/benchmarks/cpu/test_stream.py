"""Readers of the stream floor read every byte, and no kernel is one of them."""

from pathlib import Path

import pytest
import torch

from benchmarks.cpu import stream
from benchmarks.cpu.limits import huge_pages_mib
from benchmarks.cpu.stream import WAYS, prefetching_library, read, readers, stream_rate

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("threads", [1, 3])
def test_the_prefetching_reader_reads_every_byte_once(threads: int) -> None:
    library = prefetching_library()
    if library is None:
        pytest.skip("no C compiler is installed")
    memory = stream.huge_pages(5 * 512 * 3)
    memory.copy_(torch.randint(0, 256, memory.shape, dtype=torch.uint8))
    words = memory.view(torch.int64).sum().item() % 2**64
    assert {read(library, memory, way, threads) for way in WAYS} == {words}
    for place in range(0, len(memory), 64):
        memory[place] ^= 1
        assert read(library, memory, WAYS[-1], threads) != words
        memory[place] ^= 1


def test_the_best_reader_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.0, 4.0, 0.0, 2.0, 0.0, 8.0])
    monkeypatch.setattr(stream, "STREAM_BYTES", 4 << 20)
    monkeypatch.setattr(stream, "REPEATS", 1)
    monkeypatch.setattr(stream, "readers", lambda threads: [lambda memory: None] * 3)
    monkeypatch.setattr(stream.time, "thread_time", lambda: next(seconds))
    assert stream_rate(1) == (4 << 20) / 2.0 / 1e6


def test_without_a_compiler_the_plain_sum_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream.shutil, "which", lambda name: None)
    assert len(list(readers(1))) == 1


@pytest.mark.skipif(
    not SETTING.exists() or "[never]" in SETTING.read_text(), reason="huge pages are off here"
)
def test_the_memory_that_is_read_lies_in_huge_pages() -> None:
    before = huge_pages_mib()
    memory = stream.huge_pages(64 << 20)
    assert huge_pages_mib() - before > len(memory) / 2 / 2**20
