"""`make fuzz`: every target on its share of the inputs, two processes at a time."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.records.machine import revision, write_json
from tests.fuzzing.targets import TARGETS

INPUTS_PER_PROCESS = 150_000  # so that both processors are busy to the end
PROCESSES = 2


class Part(NamedTuple):
    """What one process does."""

    target: str
    inputs: int
    seed: int


class Outcome(NamedTuple):
    """What came of it; `error` is empty where every input was answered right."""

    target: str
    inputs: int
    coverage: int
    seconds: float
    error: str


def parts(inputs: int, seed: int) -> list[Part]:
    """The whole campaign, slow targets first."""
    found = []
    for target, how in TARGETS.items():
        left, number = -(-inputs * how.share // 1000), 0
        while left > 0:
            found.append(Part(target, min(left, INPUTS_PER_PROCESS), seed + number))
            left, number = left - INPUTS_PER_PROCESS, number + 1
    return sorted(found, key=lambda part: part.target in ("config", "index", "file"))


def run(part: Part) -> Outcome:
    """Run a part in a process of its own, whose end by a finding, crash or hang is an error."""
    command = [sys.executable, "-m", "tests.fuzzing.worker", *map(str, part)]
    started = time.perf_counter()
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    seconds = time.perf_counter() - started
    outcome = judged(part, result.returncode, seconds, result.stdout + result.stderr)
    print(f"{part.target}: {outcome.inputs} inputs in {seconds:.0f} s", flush=True)
    return outcome


def judged(part: Part, status: int, seconds: float, report: str) -> Outcome:
    """Read a worker's report: fewer inputs than were asked for are an error too."""
    executed = re.search(r"number_of_executed_units: (\d+)", report)
    coverage = re.findall(r"cov: (\d+)", report)
    count = 0 if executed is None else int(executed[1])
    error = ""
    if status != 0 or count < part.inputs:
        error = f"{part} ended with {status} after {count} inputs:\n{report[-4000:]}"
    return Outcome(part.target, count, int(coverage[-1]) if coverage else 0, seconds, error)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000, metavar="N")
    parser.add_argument("--seed", type=int, default=1, metavar="N")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the counts to a file")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    started, begun = time.perf_counter(), revision()
    with ThreadPoolExecutor(PROCESSES) as pool:
        outcomes = list(pool.map(run, parts(options.inputs, options.seed)))
    errors = [outcome.error for outcome in outcomes if outcome.error]
    counts = {
        target: sum(one.inputs for one in outcomes if one.target == target) for target in TARGETS
    }
    total = sum(counts.values())
    if total < options.inputs:
        errors.append(f"{total} of {options.inputs} inputs were executed")
    if options.json is not None:
        payload = {
            "seed": options.seed,
            "seconds": round(time.perf_counter() - started, 1),
            "inputs": total,
            "findings": len(errors),
            "inputs_by_target": counts,
            "covered_edges_by_target": {
                target: max(one.coverage for one in outcomes if one.target == target)
                for target in TARGETS
            },
        }
        write_json(options.json, payload, begun)
    for error in errors:
        print(error)
    by_target = ", ".join(f"{target} {count}" for target, count in counts.items())
    print(f"fuzz: {total} inputs ({by_target}), {len(errors)} findings")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
