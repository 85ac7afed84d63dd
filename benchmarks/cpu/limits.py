"""What bounds any kernel on this CPU: how fast memory streams, and what huge pages give others."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cpu.contestants import (
    activations,
    dense_contestants,
    median_times,
    peer_makers,
    rounds_of,
)
from benchmarks.cpu.kernel_rows import PeerTimes
from benchmarks.shapes import random_layer

STREAM_BYTES = 256 << 20
HUGE_PAGE = 2 << 20
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # PyTorch's allocator then asks for them


def stream_rate(threads: int) -> float:
    """Bytes per microsecond that these threads read from memory in huge pages, the best of some."""
    memory = mmap.mmap(-1, STREAM_BYTES + HUGE_PAGE)
    memory.madvise(mmap.MADV_HUGEPAGE)
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    start = -everything.data_ptr() % HUGE_PAGE
    numbers = everything[start : start + STREAM_BYTES].view(torch.float32).zero_()
    clock = time.thread_time if threads == 1 else time.perf_counter
    best = float("inf")
    for _ in range(9):
        begin = clock()
        numbers.sum()
        best = min(best, clock() - begin)
    return STREAM_BYTES / best / 1e6


def times_with_huge_pages(
    shape: tuple[int, int], tokens: list[int], peers: list[str], threads: int
) -> PeerTimes:
    """Times dense peers in a process of its own, whose allocator asks for huge pages."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        task = {"shape": shape, "tokens": tokens, "peers": peers, "threads": threads}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu.limits", json.dumps(task), str(file)],
            env={**os.environ, **HUGE_PAGES},
            check=True,
        )
        return {(*shape, m, peer): time for m, peer, time in json.loads(file.read_text())}


def _main() -> None:
    task, file = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(task["threads"])
    (n, k), threads = task["shape"], task["threads"]
    makers = peer_makers(int8=True)
    times: list[tuple[int, str, float]] = []
    with torch.inference_mode():
        dense = random_layer(n, k, "2:4", permuted=False).dense
        contestants = dense_contestants({name: makers[name] for name in task["peers"]}, dense)
        for m in task["tokens"]:
            found = median_times(contestants, activations(m, k), threads, rounds_of(m, quick=True))
            times += [(m, name, microseconds) for name, microseconds in found.items()]
    Path(file).write_text(json.dumps(times))


if __name__ == "__main__":
    _main()
