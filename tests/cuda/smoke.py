"""Multiplies once by every kernel, each in a process of its own: which hang, fail or are wrong.

    python -m tests.cuda.smoke --json FILE

What fails is tried again without launches that overlap, and with a host that waits for each: a
kernel that is wrong by itself fails in both. Processes are forked from this one, which has imported
all that they need and leaves the GPU alone: what it is, the first of them tells. What it does not
run is skipped without a process. Exits with 1 where a kernel failed or was not tried.
"""

from __future__ import annotations

import argparse
import faulthandler
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.records.machine import revision, write_json
from permllm_vllm import ops
from tests.cuda.smoke_cases import CASES, Case

LIMIT = 30.0
"""Seconds of a process."""
AGAIN = ("PERMLLM_CUDA_PDL=0", "CUDA_LAUNCH_BLOCKING=1")
"""Variables that what failed is tried with again, one at a time."""
LATE = "not run: no time was left"
FORK = multiprocessing.get_context("fork")


@dataclass
class Trial:
    """How a case ended, and the same with one of AGAIN where it failed."""

    name: str
    outcome: str
    seconds: float
    again: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return not self.outcome.startswith(("passed", "skipped"))

    def line(self) -> str:
        again = "".join(f"; with {setting} {outcome}" for setting, outcome in self.again.items())
        return f"{self.name}: {self.outcome}{again}"


def attempt(case: Case, limit: float, environment: Mapping[str, str]) -> str:
    """How the case ended in a process of its own."""
    if limit < 1:
        return LATE
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_run, args=(case, limit, environment, sender), daemon=True)
    sys.stdout.flush()
    process.start()
    sender.close()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join(10)  # a driver may hold it longer
        return f"failed: it hangs, and was stopped after {limit:.0f} s"
    try:
        said = str(receiver.recv())
    except EOFError:
        said = "passed"  # had it not died
    if process.exitcode and said.startswith("passed"):
        return f"failed: exit status {process.exitcode}"
    return said


def capability(limit: float) -> tuple[int, int] | None:
    """Of the GPU, None where the process that asks does not say it in time."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=_tell_capability, args=(sender,), daemon=True)
    process.start()
    sender.close()
    try:
        if receiver.poll(limit):
            major, minor = receiver.recv()
            return major, minor
    except EOFError:
        pass
    finally:
        process.kill()
        process.join(10)
    return None


def _tell_capability(sender: Connection) -> None:
    sender.send(torch.cuda.get_device_capability())


def _run(case: Case, limit: float, environment: Mapping[str, str], sender: Connection) -> None:
    os.environ.update(environment)
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(max(limit - 2, 0.5), file=sys.__stderr__)  # of what hangs
    try:
        case.run()
        sender.send("passed")
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines()[:1]
        sender.send(": ".join(["failed", type(error).__name__, *said]))
        sys.exit(1)


def run(
    cases: Sequence[Case],
    seconds: float,
    file: Path | None,
    found: tuple[int, int] | None = None,
) -> list[Trial]:
    """Tries all of them, then again what failed; nothing is tried after `seconds`.

    What a GPU of the compute capability `found` does not run is skipped; nothing, where that is not
    known.
    """
    end, begun = time.monotonic() + seconds, revision()
    trials: list[Trial] = []

    def save() -> None:
        if file is not None:
            write_json(file, {"kernels": [asdict(trial) for trial in trials]}, begun)

    def tried(case: Case, environment: Mapping[str, str]) -> tuple[str, float]:
        start = time.monotonic()
        outcome = attempt(case, min(LIMIT, end - start), environment)
        return outcome, round(time.monotonic() - start, 1)

    for case in cases:
        reason = case.skipped(found) if found else ""
        ended = (f"skipped: {reason}", 0.0) if reason else tried(case, {})
        trials.append(Trial(case.name, *ended))
        print(trials[-1].line(), flush=True)
        save()
    for case, trial in zip(cases, trials, strict=True):
        if not trial.failed or trial.outcome == LATE:
            continue
        for setting in AGAIN:
            name, _, value = setting.partition("=")
            trial.again[setting], _ = tried(case, {name: value})
            save()
        print(trial.line(), flush=True)
    return trials


def main() -> None:
    """Tries every kernel."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.cuda.smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=600, help="try nothing after them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the outcomes there")
    arguments = parser.parse_args()
    if ops.cuda_missing_reason:
        raise SystemExit(ops.cuda_missing_reason)
    start = time.monotonic()
    found = capability(min(LIMIT, arguments.seconds))
    left = arguments.seconds - (time.monotonic() - start)
    sys.exit(any(trial.failed for trial in run(CASES, left, arguments.json, found)))


if __name__ == "__main__":
    main()
