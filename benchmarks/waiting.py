"""How threads wait for each other, alone and beside a program that keeps a processor busy.

A thread of OpenMP that has nothing to do looks for work for a while and then sleeps. On a machine
of its own that costs nothing; beside another program the thread that all wait for may be the one
without a processor, while the others hold theirs and do nothing.

    python -m benchmarks.waiting --json OUT
    python -m benchmarks.waiting --work gradients --json OUT

The works are a step of gradients, as `permllm-offline` takes them, and a token of one sequence in
vLLM, whose kernels have all cores. Every way of waiting has a process of its own for each work, and
they take turns. The result is written after each work; one that it holds is not measured again.
"""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol
from unittest.mock import patch

import torch
from rich.console import Console

from benchmarks.cpu.conditions import conditions
from benchmarks.cpu.waiting_tables import waits
from benchmarks.engines.engine import RESERVED_CORES, Engine
from benchmarks.models import random_model, smollm2
from benchmarks.pruning.commands import magnitude_pruned
from benchmarks.records.result_file import kept_rows
from benchmarks.records.rows import Rows
from permllm_offline.model.float32_products import products_in_float32
from permllm_offline.openmp import FEW, SPINS

POLICY, THREADS = "OMP_WAIT_POLICY", "OMP_NUM_THREADS"
ALL_CORES = {RESERVED_CORES: "0"}
CORES = len(os.sched_getaffinity(0))
WAYS: Mapping[str, Mapping[str, str]] = {
    "as by default": ALL_CORES,
    f"{SPINS}={FEW}": {SPINS: FEW} | ALL_CORES,
    f"{SPINS}=500": {SPINS: "500"} | ALL_CORES,
    f"{POLICY}=passive": {POLICY: "passive"} | ALL_CORES,
    "one thread": {THREADS: "1", RESERVED_CORES: str(CORES - 1)},
}
"""Variables of a process that waits so."""
BUSY = (sys.executable, "-c", "while True: pass")
KEY = ("work", "way", "beside")
GRADIENT_TOKENS = 512
PROMPT_TOKENS, OUTPUT_TOKENS = 32, 33


class Work(Protocol):
    """Something that threads do together."""

    def seconds(self) -> float:
        """Do it once, and say what it took."""
        ...

    def close(self) -> None:
        """End its processes."""
        ...


class Gradients:
    """Steps of gradients in a process of its own, which begins with the variables that hold now."""

    def __init__(self, model: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._process = ProcessPoolExecutor(1, context, _load, (model,))
        self._process.submit(_step).result()  # it begins with the first task

    def seconds(self) -> float:
        """Of one step."""
        return self._process.submit(_step).result()

    def close(self) -> None:
        """End the process."""
        self._process.shutdown()


_loaded: list[Any] = []


def _load(model: Path) -> None:
    from transformers import AutoModelForCausalLM

    _loaded.append(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16))


def _step() -> float:
    """Gradients add up, as those of several windows do."""
    (model,) = _loaded
    tokens = torch.arange(GRADIENT_TOKENS)[None] % model.config.vocab_size
    start = time.perf_counter()
    with products_in_float32():
        model(tokens, labels=tokens).loss.backward()
    return time.perf_counter() - start


class Decoding:
    """Tokens of an engine of vLLM."""

    def __init__(self, model: Path) -> None:
        self._engine = Engine(model, eager=True)

    def seconds(self) -> float:
        """Of one token."""
        answers = self._engine.answers(1, PROMPT_TOKENS, OUTPUT_TOKENS)
        return 1 / answers.decode_tokens_per_second

    def close(self) -> None:
        """End the engine."""
        self._engine.close()


def sparse_tinyllama() -> Path:
    """The model that decodes."""
    return magnitude_pruned(random_model("tinyllama"), values="int4")


WORKS: Mapping[str, tuple[Callable[[], Path], Callable[[Path], Work]]] = {
    "gradients": (smollm2, Gradients),
    "decoding": (sparse_tinyllama, Decoding),
}
"""By name: what makes the model, and what begins the work on it in a new process."""


@contextmanager
def waiting(way: str) -> Iterator[None]:
    """Processes that begin meanwhile wait in this way."""
    with patch.dict(os.environ):
        for name in (SPINS, POLICY, THREADS):
            os.environ.pop(name, None)
        os.environ.update(WAYS[way])
        yield


@contextmanager
def busy() -> Iterator[None]:
    """One program more that never waits."""
    program = subprocess.Popen(BUSY)
    try:
        yield
    finally:
        program.kill()
        program.wait()


def measure(name: str, begin: Callable[[], Work], repeats: int) -> list[dict[str, Any]]:
    """Medians of every way, alone and beside a busy program; a first turn of each is left out."""
    found: dict[tuple[str, bool], list[float]] = {}
    with ExitStack() as ended:
        works = {}
        for way in WAYS:
            with waiting(way):
                works[way] = begin()
            ended.callback(works[way].close)
        for repeat in range(repeats + 1):
            for beside in (False, True):
                with busy() if beside else nullcontext():
                    for way, work in works.items():
                        seconds = work.seconds()
                        if repeat:
                            found.setdefault((way, beside), []).append(seconds)
    return [
        {
            "work": name,
            "way": way,
            "beside": beside,
            "seconds": round(statistics.median(times), 4),
            "fastest": round(min(times), 4),
            "slowest": round(max(times), 4),
            "repeats": repeats,
            **conditions(),
        }
        for (way, beside), times in found.items()
    ]


def run(rows: Rows, works: list[str], repeats: int) -> None:
    """Measure the works that the rows lack."""
    for name in works:
        if all((name, way, beside) in rows for way in WAYS for beside in (False, True)):
            continue
        model, work = WORKS[name]
        rows.update(measure(name, partial(work, model()), repeats))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--repeats", type=int, default=5, help="default: 5")
    parser.add_argument("--json", type=Path, help="where the result is written")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: it must be at least 1")
    facts = {
        "gradients": f"SmolLM2-135M, {GRADIENT_TOKENS} tokens, bfloat16",
        "decoding": "shape of tinyllama, 2:4 int4, one sequence",
        "cores": CORES,
    }
    with kept_rows(parser, options.json, facts, KEY) as rows:
        run(rows, options.work, options.repeats)
        Console().print(waits({"rows": rows.all()}), markup=False, highlight=False)


if __name__ == "__main__":
    main()
