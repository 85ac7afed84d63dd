"""What a process may use: the machine's memory, or what its control groups allow."""

from pathlib import Path

import pytest
import torch

from permllm_offline.run import memory_limit
from permllm_offline.run.memory_limit import free_bytes, memory_bytes


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where control groups are looked for; the process is in the topmost one of version 2."""
    monkeypatch.setattr(memory_limit, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory_limit, "_GROUPS_OF_PROCESS", tmp_path / "cgroup")
    (tmp_path / "cgroup").write_text("0::/\n")
    return tmp_path


def of_the_host() -> int:
    found = memory_bytes(torch.device("cpu"))
    assert found is not None
    return found


def test_the_memory_of_a_container_is_its_limit(groups: Path) -> None:
    whole = of_the_host()
    for text, expected in (("123456", 123456), ("max", whole), (str(2**62), whole)):
        (groups / "memory.max").write_text(f"{text}\n")
        assert of_the_host() == expected


@pytest.mark.parametrize(
    ("line", "limited"),
    [
        ("0::/system.slice/job.scope", "system.slice/job.scope/memory.max"),
        ("0::/slurm/job_7/step_0", "slurm/job_7/memory.max"),
        ("4:cpu,memory:/slurm/job_7", "memory/slurm/job_7/memory.limit_in_bytes"),
        ("4:memory:/not/seen/in/a/container", "memory/memory.limit_in_bytes"),
    ],
)
def test_the_limit_of_a_group_holds_for_those_below_it(
    line: str, limited: str, groups: Path
) -> None:
    (groups / "cgroup").write_text(f"9:name=systemd:/x\n3:cpuset:/\n{line}\n")
    (groups / limited).parent.mkdir(parents=True, exist_ok=True)
    (groups / limited).write_text("123456\n")
    assert of_the_host() == 123456


def test_without_control_groups_it_is_the_machine(groups: Path) -> None:
    whole = of_the_host()
    (groups / "cgroup").unlink()
    assert of_the_host() == whole


def test_processes_share_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory_bytes(torch.device("cpu"))
    assert whole is not None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory_bytes(torch.device("cpu")) == whole // 4


def test_what_other_programs_leave_is_what_linux_calls_available(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "meminfo"
    monkeypatch.setattr(memory_limit, "_MEMORY", file)
    assert free_bytes() is None
    file.write_text("MemTotal:  900 kB\nMemFree:  100 kB\nMemAvailable:   300 kB\n")
    assert free_bytes() == 300 * 1024
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_bytes() == 75 * 1024
