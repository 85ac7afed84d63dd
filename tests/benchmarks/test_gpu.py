"""What `make gpu` runs and how it fails, with commands that are only pretended."""

import json
import os
import sys
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.cuda import INCOMPLETE
from benchmarks.cuda import steps as gpu_steps
from benchmarks.cuda.steps import TIMED_OUT, Steps, table
from csrc.cuda import build

MODULES = {
    "setup.py": "build",
    "benchmarks.cuda.check": "check",
    "tests.cuda.smoke": "smoke",
    "pytest": "tests",
    "benchmarks.cuda.generation": "generation",
    "benchmarks.cuda.experts": "experts",
    "benchmarks.cuda.kernels": "kernels",
    "benchmarks.cuda.choices": "choices",
}
SANITIZERS = ["memcheck", "synccheck", "racecheck"]
EVERYTHING = ["build", "check", "smoke", "tests", "generation", "experts", "kernels", *SANITIZERS]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with a GPU, nvcc and a library; returns the commands that ran, in short."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(build, "missing_compiler", lambda: None)
    monkeypatch.setattr(build, "missing_cutlass", lambda: None)
    monkeypatch.setattr(gpu, "compute_sanitizer", lambda: "/opt/cuda/bin/compute-sanitizer")
    monkeypatch.setattr(gpu, "LIBRARY", tmp_path / "_C_cuda.so")
    monkeypatch.setenv("PERMLLM_CUDA_ARCHS", "90a")
    gpu.LIBRARY.touch()
    return monkeypatch


def short(command):
    if command[0].endswith("compute-sanitizer"):
        return command[command.index("--tool") + 1] if "--tool" in command else "memcheck"
    return next(MODULES[word] for word in command if word in MODULES)


def output():
    return gpu.LIBRARY.parent / "gpu"


def main(monkeypatch, statuses=None, options=()):
    """Runs `make gpu` with these exit statuses, 0 for others; its own, and what it ran.

    Each writes the result that it is told to, beside the library.
    """
    ran = []

    def run(command, limit, environment):
        ran.append(short(command))
        assert 0 < limit <= (gpu.BUILD_SECONDS if ran[-1] == "build" else gpu.SECONDS)
        if "--json" in command:
            file = Path(command[command.index("--json") + 1])
            assert not file.exists()
            file.write_text(f"{{{len(ran)}}}")
        return (statuses or {}).get(ran[-1], 0)

    monkeypatch.setattr(gpu_steps, "run", run)
    monkeypatch.setattr(sys, "argv", ["gpu", "--output", str(output()), *options])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    return exit_.value.code, ran


def written():
    """How each step ended, by its name."""
    steps = json.loads((output() / "steps.json").read_text())["steps"]
    return {step["name"]: step["outcome"] for step in steps}


def test_runs_everything_and_prints_a_table_last(machine, capsys):
    assert main(machine) == (False, EVERYTHING)
    table = capsys.readouterr().out.splitlines()[-len(EVERYTHING) :]
    assert [line.split("  ")[0] for line in table] == [
        "build", "the kernels run here", "smoke", "tests", "generation", "experts", "kernels",
        "sanitizer, memcheck", "sanitizer, synccheck", "sanitizer, racecheck",
    ]  # fmt: skip
    assert all(line.endswith("passed") for line in table)
    assert list(written().values()) == ["passed"] * len(EVERYTHING)


@pytest.mark.parametrize("step", EVERYTHING)
def test_fails_with_any_step(machine, capsys, step):
    code, ran = main(machine, {step: 3})
    assert code
    assert "failed: exit status 3" in capsys.readouterr().out
    # Nothing that follows would be about the kernels, but for which of them do not run.
    fatal = {"build": ["build"], "check": ["build", "check", "smoke"]}
    assert ran == fatal.get(step, EVERYTHING)


def test_timing_that_leaves_something_out_is_a_failure(machine, capsys):
    code, ran = main(machine, {"kernels": INCOMPLETE})
    assert code
    assert ran == EVERYTHING
    row = capsys.readouterr().out.splitlines()[-len(SANITIZERS) - 1]
    assert "failed: not all of it was measured" in row


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((8, 9), "80"), ((9, 0), "90a"), ((10, 3), "100"), ((12, 1), "120")],
)
def test_builds_for_an_architecture_that_nvcc_knows(machine, capability, architecture):
    """nvcc 12.8 refuses 103 and 121."""
    machine.delenv("PERMLLM_CUDA_ARCHS")
    machine.setattr(torch.cuda, "get_device_capability", lambda: capability)
    main(machine)
    assert os.environ["PERMLLM_CUDA_ARCHS"] == architecture


def test_architectures_that_are_named_are_built(machine):
    machine.setenv("PERMLLM_CUDA_ARCHS", "100a")
    main(machine)
    assert os.environ["PERMLLM_CUDA_ARCHS"] == "100a"


def test_a_library_that_does_not_load_is_a_failure(machine):
    """Not an evening of skipped tests: the library is asked before they are run."""
    assert main(machine, {"check": 1}, ["--no-build", "--steps", "tests"]) == (True, ["check"])


def test_without_a_toolkit_the_library_that_is_there_is_used(machine, capsys):
    machine.setattr(build, "missing_compiler", lambda: "nvcc was not found")
    code, ran = main(machine)
    assert not code
    assert ran == EVERYTHING[1:]
    assert "skipped: nvcc was not found; _C_cuda.so is used as it is" in capsys.readouterr().out
    gpu.LIBRARY.unlink()
    assert main(machine) == (True, [])
    assert "failed: nvcc was not found" in capsys.readouterr().out


def test_without_cutlass_alone_a_library_that_is_there_is_used(machine, capsys):
    """It may have CUTLASS' kernels; what is built here would not."""
    machine.setattr(build, "missing_cutlass", lambda: "the CUTLASS headers were not found")
    assert main(machine) == (False, EVERYTHING[1:])
    said = "skipped: the CUTLASS headers were not found; _C_cuda.so is used as it is"
    assert said in capsys.readouterr().out


def test_without_cutlass_alone_the_other_kernels_are_built(machine, capsys):
    machine.setattr(build, "missing_cutlass", lambda: "the CUTLASS headers were not found")
    gpu.LIBRARY.unlink()
    wishes = []

    def run(command, limit, environment):
        wishes.append(environment.get("PERMLLM_BUILD_CUDA"))
        if len(wishes) == 1:
            gpu.LIBRARY.touch()
        return 0

    machine.setattr(gpu_steps, "run", run)
    steps = Steps(100, output() / "steps.json", "NVIDIA H100", ())
    assert gpu.provide_library(steps, builds=True)
    assert wishes == [""]  # a build that is demanded would fail
    assert "leaves out CUTLASS' kernels for many tokens: the CUTLASS" in capsys.readouterr().out
    assert written() == {"build, without CUTLASS": "passed"}
    assert steps.done[0].kind == "build"
    gpu.LIBRARY.unlink()
    assert not gpu.provide_library(steps, builds=True)  # setup.py found no compiler, and said so
    assert written()["build, without CUTLASS"].startswith("failed: its output says")


def test_a_second_run_replaces_what_the_first_wrote(machine):
    assert main(machine) == (False, EVERYTHING)
    assert main(machine, {"tests": 1}) == (True, EVERYTHING)
    assert len(written()) == len(EVERYTHING)
    assert written()["tests"] == "failed: exit status 1"


def test_other_steps_are_added_to_what_is_there(machine, capsys):
    options = ["--steps", "kernels,tests"]
    assert main(machine, {"tests": 1}, options) == (True, ["build", "check", "tests", "kernels"])
    kernels = (output() / "kernels-nvidia-h100.json").read_text()
    capsys.readouterr()
    code, ran = main(machine, options=["--steps", "smoke,sanitizer"])
    assert (code, ran) == (False, ["build", "check", "smoke", *SANITIZERS])
    assert list(written())[:2] == ["tests", "kernels"]
    assert len(written()) == 2 + len(ran)
    assert (output() / "kernels-nvidia-h100.json").read_text() == kernels
    said = capsys.readouterr().out.partition("Of earlier runs:\n")[2].partition("Of this one:\n")
    assert "exit status 1" in said[0]
    assert "exit status" not in said[2]


def test_another_gpu_replaces_nothing(machine):
    main(machine)
    machine.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    main(machine, options=["--steps", "kernels"])
    steps = json.loads((output() / "steps.json").read_text())["steps"]
    assert [step["gpu"][-4:] for step in steps] == ["H100"] * len(EVERYTHING) + ["H200"] * 3
    assert {file.name for file in output().glob("kernels-*")} == {
        "kernels-nvidia-h100.json", "kernels-nvidia-h200.json"
    }  # fmt: skip


def test_a_file_that_holds_no_steps_is_left_alone(machine, capsys):
    output().mkdir()
    (output() / "steps.json").write_text("[]")
    assert main(machine) == (2, [])
    assert "holds no steps of an earlier run" in capsys.readouterr().err
    assert (output() / "steps.json").read_text() == "[]"


@pytest.mark.parametrize("text", ["", "test", "tests,", "tests kernels", "build"])
def test_steps_that_are_none_are_refused(text):
    with pytest.raises(ArgumentTypeError, match=r"'.*' is no step: give some of smoke,tests,gen"):
        gpu.steps_of(text)


def test_steps_run_in_their_order():
    assert gpu.steps_of("sanitizer,smoke,smoke") == ("smoke", "sanitizer")
    assert gpu.steps_of(",".join(gpu.STEPS)) == gpu.STEPS
    assert gpu.steps_of("choices,smoke") == ("smoke", "choices")


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "ten"])
def test_seconds_that_are_none_are_refused(text):
    with pytest.raises(ArgumentTypeError, match=f"'{text}' is no time: give seconds, more than 0"):
        gpu.seconds_of(text)


@pytest.mark.parametrize("step", gpu.EVERY)
def test_one_step_alone_has_all_the_time(machine, step):
    limits, commands = {}, {}

    def run(command, limit, environment):
        limits[short(command)], commands[short(command)] = limit, command
        return 0

    now = 0.0
    machine.setattr(time, "monotonic", lambda: now)
    machine.setattr(gpu_steps, "run", run)
    argv = ["gpu", "--output", str(output()), "--steps", step, "--seconds", "333"]
    machine.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit):
        gpu.main()
    if step == "sanitizer":
        assert limits["memcheck"] == 333 - 2 * gpu.SYNCHRONISATION_SECONDS
    else:
        assert limits[step] == 333
        words = commands[step]
        reserves = {"smoke": 35, "experts": 20, "kernels": 45, "choices": 45}
        found = words[words.index("--seconds") + 1] if "--seconds" in words else None
        assert found == (str(333 - reserves[step]) if step in reserves else None)


def test_a_test_that_hangs_is_named(machine):
    """Its name is written before it runs, and a thread ends what waits for a kernel."""
    seen = []
    machine.setattr(
        gpu_steps, "run", lambda command, limit, environment: seen.append((command, environment))
    )
    measured(("tests",))
    ((command, environment),) = seen
    assert {"-v", "--timeout=60", "--timeout-method=thread"} <= {*command}
    assert environment["PYTHONFAULTHANDLER"] == "1"
    assert environment["TORCHINDUCTOR_COMPILE_THREADS"] == "1"
    machine.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    assert gpu.timeouts() == []


def measured(chosen=gpu.STEPS):
    """What `measure` has done."""
    steps = Steps(gpu.SECONDS, output() / "steps.json", "NVIDIA H100", ())
    gpu.measure(steps, output(), None, chosen)
    return steps


def test_without_the_sanitizer_nothing_fails(machine, capsys):
    machine.setattr(gpu, "compute_sanitizer", lambda: None)
    code, ran = main(machine)
    assert not code
    assert not {*SANITIZERS} & {*ran}
    assert "neither on the PATH nor beside nvcc" in capsys.readouterr().out


def test_what_no_time_is_left_for_is_a_failure(machine, capsys):
    clock = iter([0.0, *[gpu.BUILD_SECONDS] * 50])
    machine.setattr(time, "monotonic", lambda: next(clock))
    code, ran = main(machine)
    assert code
    assert ran == []  # the build
    assert "not run: no time was left" in capsys.readouterr().out


@pytest.mark.parametrize("build_seconds", [0, 400, 1100])
def test_a_build_takes_no_time_from_what_follows(machine, build_seconds):
    """On a clock that every command moves on by as much as it is said to take here."""
    now, left = 0.0, {}
    seconds = {
        "build": build_seconds, "check": 20, "smoke": 60, "tests": 150, "generation": 100,
        "experts": 20,
    }  # fmt: skip

    def run(command, limit, environment):
        nonlocal now
        name = short(command)
        left[name] = limit
        assert seconds.get(name, 0) <= limit, name
        now += seconds.get(name, 0)
        return 0

    machine.setattr(time, "monotonic", lambda: now)
    machine.setattr(gpu_steps, "run", run)
    machine.setattr(sys, "argv", ["gpu", "--output", str(output())])
    with pytest.raises(SystemExit) as exit_:
        gpu.main()
    assert exit_.value.code is False
    assert list(left) == EVERYTHING
    assert left["kernels"] == gpu.SECONDS - sum(seconds.values()) + build_seconds - 150
    assert left["kernels"] > gpu.LAST_ROWS


def test_timing_leaves_time_for_the_sanitizer(machine):
    limits = {}

    def run(command, limit, environment):
        limits[short(command)] = limit
        if short(command) == "kernels":
            begins = float(command[command.index("--seconds") + 1])
            assert begins <= limit - gpu.LAST_ROWS
        return 0

    machine.setattr(gpu_steps, "run", run)
    measured()
    assert limits["kernels"] <= gpu.SECONDS - gpu.SHARES["sanitizer"]
    measured(gpu.STEPS[:-1])
    assert limits["kernels"] > gpu.SECONDS - gpu.SHARES["sanitizer"]


def test_memory_that_is_checked_too_slowly_is_no_failure(machine, capsys):
    code, ran = main(machine, {"memcheck": TIMED_OUT})
    assert not code
    assert ran == EVERYTHING
    assert "skipped: stopped after" in capsys.readouterr().out


def test_racecheck_fails_with_errors_alone(machine):
    commands = []
    machine.setattr(gpu_steps, "run", lambda command, *_: commands.append(command) or 0)
    measured()
    levels = [command for command in commands if "--racecheck-detect-level" in command]
    assert [short(command) for command in levels] == ["racecheck"]
    assert levels[0][levels[0].index("--racecheck-detect-level") + 1] == "error"


@pytest.mark.parametrize("memcheck", [20, 149])
def test_barriers_are_checked_in_what_time_is_left(machine, memcheck, capsys):
    """And if that is none, or not enough, nothing fails."""
    now, ran = 0.0, []
    seconds = {"kernels": gpu.SECONDS - gpu.SHARES["sanitizer"], "memcheck": memcheck}

    def run(command, limit, environment):
        nonlocal now
        name = short(command)
        ran.append(name)
        now += min(limit, seconds.get(name, 0 if name not in SANITIZERS else 1000))
        return TIMED_OUT if seconds.get(name, name in SANITIZERS and 1000) > limit else 0

    machine.setattr(time, "monotonic", lambda: now)
    machine.setattr(gpu_steps, "run", run)
    steps = measured()
    assert not any(step.failed for step in steps.done)
    assert ran[-2:] == SANITIZERS[1:] if memcheck == 20 else ran[-1] == SANITIZERS[1]
    assert "skipped: stopped after" in table(steps.done)
    assert ("skipped: no time was left" in table(steps.done)) == (memcheck == 149)


def test_the_sanitizer_is_looked_for_beside_nvcc(monkeypatch, tmp_path):
    for name in ("nvcc", "compute-sanitizer"):
        (tmp_path / name).touch(mode=0o755)
    monkeypatch.setattr(gpu.toolkit, "nvcc", lambda: str(tmp_path / "nvcc"))
    monkeypatch.setenv("PATH", "")
    assert gpu.compute_sanitizer() == str(tmp_path / "compute-sanitizer")
    (tmp_path / "compute-sanitizer").unlink()
    assert gpu.compute_sanitizer() is None
