"""Peers in huge pages have some, and are timed as often as the others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.cpu import contestants, limits
from benchmarks.cpu.contestants import peer_makers, rounds_of

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ALLOCATED = 64 << 20
CHILD = f"""
import ctypes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
memory = libc.malloc(ctypes.c_size_t({ALLOCATED}))
ctypes.memset(memory, 1, {ALLOCATED})
with open("/proc/self/smaps_rollup") as lines:
    print(next(line for line in lines if line.startswith("AnonHugePages:")).split()[1])
"""


def huge_kib(environment):
    found = subprocess.run(
        [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, check=True
    )
    return int(found.stdout)


@pytest.mark.skipif(
    not SETTING.exists() or "[madvise]" not in SETTING.read_text(),
    reason="this kernel gives huge pages to everyone or to no one",
)
def test_what_malloc_gives_lies_in_huge_pages():
    assert huge_kib(dict(os.environ)) < ALLOCATED / 2 / 1024
    assert huge_kib(limits.with_huge_pages(os.environ)) > ALLOCATED / 2 / 1024


def test_other_tunables_stay():
    found = limits.with_huge_pages({"A": "b", "GLIBC_TUNABLES": "glibc.malloc.perturb=1"})
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.perturb=1:glibc.malloc.hugetlb=1"
    assert (found["A"], found["THP_MEM_ALLOC_ENABLE"]) == ("b", "1")


@pytest.mark.parametrize("quick", [False, True])
def test_the_child_times_as_often_and_says_how_much_lies_in_huge_pages(
    quick, tmp_path, monkeypatch
):
    rounds = []
    sizes = iter([10.0, 12.5, 20.0, 25.0])

    def median_times(found, x, threads, count):
        rounds.append((len(x), count))
        return dict.fromkeys(found, 7.0)

    def run(command, env, check):
        assert env["GLIBC_TUNABLES"].endswith("glibc.malloc.hugetlb=1")
        monkeypatch.setattr(sys, "argv", ["limits", *command[3:]])
        limits._main()

    monkeypatch.setattr(limits.torch, "set_num_threads", lambda threads: None)
    monkeypatch.setattr(limits.subprocess, "run", run)
    monkeypatch.setattr(limits, "median_times", median_times)
    monkeypatch.setattr(limits, "huge_pages_mib", lambda: next(sizes))
    monkeypatch.setattr(limits, "peer_makers", lambda int8: dict.fromkeys("ab", torch_linear()))
    monkeypatch.setattr(contestants, "POOL_BYTES", 1)
    found = limits.times_with_huge_pages((32, 64), [1, 64], ["a", "b"], 1, quick=quick)
    assert {key[2:]: (one.us, one.mib) for key, one in found.items()} == {
        (1, "a"): (7.0, 2.5), (1, "b"): (7.0, 5.0), (64, "a"): (7.0, 2.5), (64, "b"): (7.0, 5.0)
    }  # fmt: skip
    assert rounds == [(m, rounds_of(m, quick)) for m in (1, 64)]


def torch_linear():
    return peer_makers(int8=False)["torch"]
