"""Commands that run one after the other until a deadline, and a file of how they ended."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.cuda import INCOMPLETE
from benchmarks.records.machine import revision, write_json

ROOT = Path(__file__).resolve().parents[2]
TIMED_OUT = 124
LATE = "no time was left"
UNENDED = "failed: it did not end"
"""What a file says of a step that still runs, or ran when all was cut off."""


@dataclasses.dataclass
class Step:
    """What ran, for the closing table; of several of one kind, the name begins alike."""

    name: str
    outcome: str
    seconds: float = 0.0
    gpu: str = ""
    date: str = ""
    commit: str | None = None

    @property
    def kind(self) -> str:
        """What --steps calls it."""
        return self.name.partition(",")[0]

    @property
    def failed(self) -> bool:
        return not self.outcome.startswith(("passed", "skipped"))


class Steps:
    """Runs commands until a common deadline; how they ended is kept in a file after each.

    Args:
        seconds: to the deadline.
        file: of JSON, with the steps of earlier runs or none.
        gpu: its name, which all of them have.
        replaced: kinds of steps whose earlier outcomes, on this GPU, are forgotten.

    Raises:
        ValueError: the file holds something else.
    """

    def __init__(self, seconds: float, file: Path, gpu: str, replaced: Collection[str]) -> None:
        self._file, self._gpu, self._begun = file, gpu, revision()
        self.done: list[Step] = []
        self.earlier = [
            step for step in _read(file) if step.gpu != gpu or step.kind not in replaced
        ]
        self.begin(seconds)

    def begin(self, seconds: float) -> None:
        """Puts the deadline `seconds` from now."""
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds to the deadline."""
        return self._end - time.monotonic()

    def run(
        self,
        name: str,
        command: list[str],
        limit: float,
        *,
        optional: bool = False,
        **environment: str,
    ) -> bool:
        """Runs a command for `limit` seconds at most, and not past the deadline; True if passed.

        What is `optional` may be left out, or stopped, for want of time.
        """
        limit = min(limit, self.left())
        if limit < 1:
            self.note(name, f"skipped: {LATE}" if optional else f"not run: {LATE}")
            return False
        step = self.note(name, UNENDED)
        print("+", " ".join(command), flush=True)
        start = time.monotonic()
        status = run(command, limit, environment)
        step.seconds = time.monotonic() - start
        step.outcome = {
            0: "passed",
            TIMED_OUT: f"{'skipped: ' if optional else ''}stopped after {limit:.0f} s",
            INCOMPLETE: "failed: not all of it was measured, see what it printed",
        }.get(status, f"failed: exit status {status}")
        self._save()
        print(table([step]), flush=True)
        return status == 0

    def note(self, name: str, outcome: str) -> Step:
        """Adds a step that ended, or begins, as `outcome` says."""
        today = datetime.date.today().isoformat()
        self.done.append(Step(name, outcome, 0.0, self._gpu, today, self._begun))
        self._save()
        return self.done[-1]

    def _save(self) -> None:
        steps = [dataclasses.asdict(step) for step in (*self.earlier, *self.done)]
        write_json(self._file, {"steps": steps}, self._begun)


def _read(file: Path) -> list[Step]:
    if not file.exists():
        return []
    try:
        found: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["steps"]
        return [Step(**step) for step in found]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file} holds no steps of an earlier run ({error}): remove it, or give another "
            "--output"
        ) from error


def table(steps: Sequence[Step]) -> str:
    """A line for each step."""
    width = max((len(step.name) for step in steps), default=0)
    return "\n".join(
        f"{step.name:<{width}}  {step.seconds:>5.0f} s  {step.outcome}" for step in steps
    )


def run(command: list[str], limit: float, environment: Mapping[str, str]) -> int:
    """The exit status of a command, or 124 where it and what it started were stopped.

    It imports from this checkout first.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path, **environment},
        start_new_session=True,
    )
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:  # after an interruption too, which does not reach a session of its own
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a driver may hold what hangs
                process.wait(timeout=10)
