"""Commands with a deadline, what is kept of them, and what is left of them when all is cut off."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.cuda import check, steps
from benchmarks.cuda.steps import ROOT, UNENDED, Steps

PYTHON = [sys.executable, "-c"]


def outcomes(file):
    return [step["outcome"] for step in json.loads(file.read_text())["steps"]]


def test_stops_a_command_and_what_it_started():
    nested = [*PYTHON, "import subprocess; subprocess.run(['sleep', '60'])"]
    assert steps.run(nested, 0.5, {}) == steps.TIMED_OUT
    assert steps.run([*PYTHON, "import sys; sys.exit(7)"], 60, {}) == 7


def test_a_command_imports_from_this_checkout(monkeypatch, tmp_path):
    for name in ("tests", "csrc"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSAFEPATH", "1")  # the folder that it runs in is not looked at
    found = "from benchmarks.cuda.check import foreign; assert not foreign(), foreign()"
    assert steps.run([*PYTHON, found], 60, {}) == 0


def test_each_step_is_kept_when_it_begins_and_when_it_ends(monkeypatch, tmp_path):
    file, seen = tmp_path / "steps.json", []

    def run(command, limit, environment):
        seen.append(outcomes(file))
        return len(seen) - 1

    monkeypatch.setattr(steps, "run", run)
    done = Steps(60, file, "a GPU", ())
    assert done.run("tests", ["tests"], 10)
    assert not done.run("kernels", ["kernels"], 10)
    assert seen == [[UNENDED], ["passed", UNENDED]]
    assert outcomes(file) == ["passed", "failed: exit status 1"]


INTERRUPTED = """
import signal, sys
from pathlib import Path
from benchmarks import gpu
from benchmarks.cuda import steps
import torch

child = "import os, time; print('child', os.getpid(), flush=True); time.sleep(60)"
signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in the background ignore it
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "a GPU"
gpu.run = lambda arguments, done: done.run("tests", [sys.executable, "-c", child], 60)
sys.argv = ["gpu", "--output", sys.argv[1]]
gpu.main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interruption_ends_what_runs_and_loses_nothing(tmp_path, number):
    process = subprocess.Popen(
        [*PYTHON, INTERRUPTED, str(tmp_path)],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    child = next(int(line.split()[1]) for line in process.stdout if line.startswith("child"))
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode in (128 + number, -number)
    assert said.splitlines()[-1].endswith(UNENDED)
    assert outcomes(tmp_path / "steps.json") == [UNENDED]
    end = time.monotonic() + 30
    while Path(f"/proc/{child}").exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


def test_a_package_from_elsewhere_is_named(monkeypatch):
    assert check.foreign() == ""
    monkeypatch.setitem(sys.modules, "tests", SimpleNamespace(__file__="/other/tests/__init__.py"))
    assert f"tests is imported from /other/tests/__init__.py, not from {ROOT}" in check.foreign()
    monkeypatch.setitem(sys.modules, "tests", SimpleNamespace(__file__=None))
    assert "tests is imported from several places" in check.foreign()


@pytest.mark.parametrize("reason", ["", "the result of a small layer is wrong"])
def test_the_check_fails_with_the_reason(monkeypatch, reason):
    monkeypatch.setattr(check, "fallback_reason", lambda *_: reason)
    with pytest.raises(SystemExit) as exit_:
        check.main()
    assert exit_.value.code == (reason or None)
