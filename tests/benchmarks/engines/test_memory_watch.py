"""What processes hold at most, and that they end beyond a limit."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch

from benchmarks.engines.memory_watch import MemoryWatch, private_mib

HOLDING = """
import sys
held = bytearray(int(sys.argv[1]) << 20)
held[::4096] = b"x" * len(held[::4096])
print("held", flush=True)
sys.stdin.readline()
del held
print("freed", flush=True)
sys.stdin.readline()
"""


@contextmanager
def holding(mib: int) -> Iterator["subprocess.Popen[str]"]:
    """A process that holds memory, and frees it at a word."""
    command = [sys.executable, "-c", HOLDING, str(mib)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        said(process, "held")
        yield process
        process.kill()


def said(process: "subprocess.Popen[str]", word: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == word


def test_the_peak_stays_when_memory_is_freed() -> None:
    with closing(MemoryWatch()) as watch, holding(96) as process:
        watch.sample()
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
        said(process, "freed")
        assert private_mib([psutil.Process(process.pid)]) < 64
        assert 96 < watch.peak_mib < 160


def test_only_what_was_started_since_counts() -> None:
    with holding(64), closing(MemoryWatch()) as watch:
        watch.sample()
        assert watch.processes() == []
        assert watch.peak_mib == 0
        with holding(16) as later:
            assert [process.pid for process in watch.processes()] == [later.pid]
            watch.settle()
            with holding(16):
                assert [process.pid for process in watch.processes()] == [later.pid]


STARTING = """
import subprocess, sys
sys.stdin.readline()
child = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=sys.stdin)
print("started", flush=True)
child.wait()
"""


@contextmanager
def starting() -> Iterator["subprocess.Popen[str]"]:
    """A process that starts another at a word; both end when its input does."""
    command = [sys.executable, "-c", STARTING]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        yield process


def start(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    said(process, "started")


def test_what_an_older_process_starts_does_not_count() -> None:
    with starting() as older, closing(MemoryWatch(1)) as watch:
        start(older)
        assert watch.processes() == []
        with starting() as later:
            start(later)
            assert len(watch.processes()) == 2
            assert watch.processes()[0].pid == later.pid


def test_this_process_counts_where_it_is_the_front_end() -> None:
    with closing(MemoryWatch()) as without, closing(MemoryWatch(this_too=True)) as watch:
        before = private_mib([psutil.Process()])
        held = torch.ones(64 << 20, dtype=torch.uint8)
        watch.sample()
        without.sample()
        assert watch.peak_mib > before + 48
        assert without.peak_mib == 0
        del held


def test_processes_end_beyond_the_limit() -> None:
    with holding(8) as other, closing(MemoryWatch(1 / 16)) as watch:
        command = [sys.executable, "-c", HOLDING, "96"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.wait(60) == -signal.SIGKILL  # the watch looks by itself
        watch.close()
        assert watch.exceeded is not None
        assert "more than 0.0625 GiB: give a higher --memory-limit" in watch.exceeded
        assert other.poll() is None


def test_within_the_limit_nothing_ends() -> None:
    with closing(MemoryWatch(1)) as watch, holding(32) as process:
        watch.sample()
        assert watch.exceeded is None
        assert process.poll() is None


def test_a_process_that_has_ended_has_none() -> None:
    with holding(1) as process:
        found = psutil.Process(process.pid)
    assert private_mib([found]) == 0


def test_a_machine_without_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(available=8 << 30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    with closing(MemoryWatch()) as watch:
        watch.sample()
        assert watch.full() == ""
        machine.available = 100 << 20
        watch.sample()
        machine.available = 4 << 30
        watch.sample()
        assert watch.full() == "the machine had 100 MiB of memory left"
    with closing(MemoryWatch()) as watch:
        watch.sample()
        assert watch.full() == ""
