"""What huge pages give to dense peers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks.cpu.contestants import (
    Contestant,
    dense_contestants,
    median_times,
    peer_makers,
    rounds_of,
)
from benchmarks.cpu.kernel_rows import InHugePages, PeerTimes
from benchmarks.cpu.products import activations
from benchmarks.shapes import random_layer

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1", TUNABLES: "glibc.malloc.hugetlb=1"}
"""What makes PyTorch's allocator ask for them, and malloc, from which oneDNN has its weights."""


def times_with_huge_pages(
    shape: tuple[int, int],
    tokens: list[int],
    peers: list[str],
    threads: int,
    *,
    quick: bool,
    dtype: str = "bfloat16",
) -> PeerTimes:
    """Times dense peers in a process of its own, whose allocators ask for huge pages."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "times.json")
        task: dict[str, object] = {
            "shape": shape,
            "tokens": tokens,
            "peers": peers,
            "threads": threads,
        }
        task["dtype"] = dtype
        subprocess.run(
            [
                *(sys.executable, "-m", "benchmarks.cpu.limits"),
                *(json.dumps({**task, "quick": quick}), str(file)),
            ],
            env=with_huge_pages(os.environ),
            check=True,
        )
        found = json.loads(file.read_text())
    return {(*shape, m, peer): InHugePages(time, mib) for m, peer, time, mib in found}


def with_huge_pages(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of a process whose allocators ask for huge pages; other tunables stay."""
    tunables = [environment[TUNABLES]] if environment.get(TUNABLES) else []
    joined = ":".join([*tunables, HUGE_PAGES[TUNABLES]])
    return {**environment, **HUGE_PAGES, TUNABLES: joined}


def huge_pages_mib() -> float:
    """Memory of this process that lies in transparent huge pages."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        name, _, size = line.partition(":")
        if name == "AnonHugePages":
            return int(size.split()[0]) / 1024
    return 0.0


def _main() -> None:
    task, file = json.loads(sys.argv[1]), sys.argv[2]
    torch.set_num_threads(task["threads"])
    (n, k), threads = task["shape"], task["threads"]
    makers = peer_makers(int8=True)
    contestants: dict[str, Contestant] = {}
    mib: dict[str, float] = {}
    times: list[tuple[int, str, float, float]] = []
    with torch.inference_mode():
        dtype = getattr(torch, task["dtype"])
        dense = random_layer(n, k, "2:4", permuted=False).dense.to(dtype)
        for name in task["peers"]:
            before = huge_pages_mib()
            contestants |= dense_contestants({name: makers[name]}, dense)
            mib[name] = round(huge_pages_mib() - before, 1)
        for m in task["tokens"]:
            rounds = rounds_of(m, task["quick"])
            found = median_times(contestants, activations(m, k, dtype), threads, rounds)
            times += [(m, name, time, mib[name]) for name, time in found.items()]
    Path(file).write_text(json.dumps(times))


if __name__ == "__main__":
    _main()
