"""Multiplies once by every kernel, each in a process of its own: which hang, fail or are wrong.

    python -m tests.cuda.smoke --json FILE

What fails is tried again without launches that overlap, and with a host that waits for each: a
kernel that is wrong by itself fails in both. Processes are forked from this one, which has imported
all that they need and leaves the GPU alone. Exits with 1 where a kernel failed or was not tried.
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


def _run(case: Case, limit: float, environment: Mapping[str, str], sender: Connection) -> None:
    os.environ.update(environment)
    faulthandler.enable(sys.__stderr__)
    faulthandler.dump_traceback_later(max(limit - 2, 0.5), file=sys.__stderr__)  # of what hangs
    try:
        reason = case.skipped()
        if not reason:
            case.run()
        sender.send(f"skipped: {reason}" if reason else "passed")
    except Exception as error:
        traceback.print_exc()
        said = str(error).strip().splitlines()[:1]
        sender.send(": ".join(["failed", type(error).__name__, *said]))
        sys.exit(1)


def run(cases: Sequence[Case], seconds: float, file: Path | None) -> list[Trial]:
    """Tries all of them, then again what failed; nothing is tried after `seconds`."""
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
        trials.append(Trial(case.name, *tried(case, {})))
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
    sys.exit(any(trial.failed for trial in run(CASES, arguments.seconds, arguments.json)))


if __name__ == "__main__":
    main()
