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

from benchmarks.cpu_contestants import (
    activations,
    dense_contestants,
    dense_makers,
    median_times,
    rounds_of,
)
from benchmarks.shapes import random_layer

STREAM_BYTES = 256 << 20
HUGE_PAGE = 2 << 20
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}  # PyTorch's allocator then asks for them
#: Microseconds by (outputs, inputs, tokens, peer).
PeerTimes = dict[tuple[int, int, int, str], float]


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
    shapes: list[tuple[int, int]], tokens: list[int], threads: int, quick: bool
) -> PeerTimes:
    """Times the dense peers in a process of its own, whose allocator asks for huge pages."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        task = {"shapes": shapes, "tokens": tokens, "threads": threads, "quick": quick}
        subprocess.run(
            [sys.executable, "-m", "benchmarks.cpu_limits", json.dumps(task), str(file)],
            env={**os.environ, **HUGE_PAGES},
            check=True,
        )
        return {
            (n, k, m, peer): microseconds
            for n, k, m, peer, microseconds in json.loads(file.read_text())
        }


def _main() -> None:
    task, file = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(task["threads"])
    times: list[tuple[int, int, int, str, float]] = []
    with torch.inference_mode():
        for n, k in task["shapes"]:
            dense = random_layer(n, k, "2:4", permuted=False).dense
            contestants = dense_contestants(dense_makers(), dense)
            for m in task["tokens"]:
                found = median_times(
                    contestants, activations(m, k), task["threads"], rounds_of(m, task["quick"])
                )
                times += [(n, k, m, name, microseconds) for name, microseconds in found.items()]
    Path(file).write_text(json.dumps(times))


if __name__ == "__main__":
    _main()
