"""A real `vllm serve` under minutes of mixed traffic: nothing may break, leak or be wrong.

    python -m benchmarks.soak --json OUT

Once in bfloat16 through the compiled kernel, once in float32, where every whole answer must be the
answer that the same question got alone. The last line counts; the exit status is 1 if anything is
wrong.
"""

import argparse
import asyncio
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prometheus_client.parser import text_string_to_metric_families

from .engines.memory import Memory, watched
from .engines.server import Server, serve
from .engines.traffic import Question, Tally, Traffic
from .engines.twins import is_twin, name_parent
from .models import smollm2
from .pruning.commands import prune
from .records.machine import revision, write_json
from .records.result_file import new_result
from .texts import sotu

DTYPES = ("bfloat16", "float32")
CONTEXT = 1024
# Few enough blocks of the key-value cache that traffic touches all of them while it warms up, and
# that requests now and then have to wait for one another.
BLOCKS = 64
ARGUMENTS = (
    *("--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "8"),
    *("--num-gpu-blocks-override", str(BLOCKS)),
)
LARGEST_GROWTH_MIB = 64.0
IDLE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
SETTLE_SECONDS = 30.0


@dataclass(frozen=True)
class Soaked:
    """One server's record."""

    dtype: str
    backend: str
    seconds: float
    tally: Tally
    memory: Memory
    metrics: dict[str, float]

    def failures(self) -> list[str]:
        """What is wrong, in words; empty if nothing is."""
        tally, (before, after) = self.tally, self.memory.growth()
        found = [f"error: {error}" for error in tally.errors]
        found += [f"wrong answer: {wrong}" for wrong in tally.wrong]
        found += [
            f"no request was {kind}"
            for kind in ("completed", "cancelled", "refused")
            if getattr(tally, kind) == 0
        ]
        if self.dtype == "bfloat16" and "backend cpu" not in self.backend:
            found.append(f"no compiled kernel served: {self.backend or 'nothing in the log'}")
        if self.dtype == "float32" and tally.compared < tally.completed:
            found.append(f"{tally.completed - tally.compared} answers were not compared")
        if after - before > LARGEST_GROWTH_MIB:
            found.append(
                f"memory grew from {before:.0f} to {after:.0f} MiB, allowed are "
                f"{LARGEST_GROWTH_MIB:.0f}"
            )
        found += [
            f"{name} is {self.metrics.get(name)} when all is over, not 0"
            for name in IDLE
            if self.metrics.get(name) != 0
        ]
        return found

    def to_dict(self) -> dict[str, Any]:
        """The record as plain numbers, times in seconds and memory in MiB."""
        tally, (before, after) = self.tally, self.memory.growth()
        return {
            "dtype": self.dtype,
            "backend": self.backend,
            "seconds": round(self.seconds, 1),
            "requests": tally.requests,
            "completed": tally.completed,
            "compared_with_single_request": tally.compared,
            "cancelled": tally.cancelled,
            "refused": tally.refused,
            "errors": len(tally.errors),
            "wrong_answers": len(tally.wrong),
            "tokens": tally.tokens,
            "tokens_per_second": round(tally.tokens / self.seconds, 1),
            "first_token_seconds": percentiles(tally.first_token),
            "answer_seconds": percentiles(tally.whole),
            "resident_mib_warm": round(before, 1),
            "resident_mib_end": round(after, 1),
            "resident_mib_growth": round(after - before, 1),
            "resident_mib_samples": [round(sample) for sample in self.memory.samples[::5]],
            "metrics": self.metrics,
            "failures": self.failures(),
        }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """Median, 95th percentile and maximum; nothing of nothing."""
    if not values:
        return {}
    ordered = sorted(values)
    of = {"p50": 0.5, "p95": 0.95, "max": 1.0}
    return {name: round(ordered[int(share * (len(ordered) - 1))], 3) for name, share in of.items()}


def checkpoint() -> Path:
    """SmolLM2 at 2:4 with permutations, made once beside the dense model."""
    dense = smollm2()
    output = dense.with_name(f"{dense.name}-wanda-cp-2to4")
    if not is_twin(output, dense):
        prune(
            *(dense, output, "--method", "wanda+cp", "--pattern", "2:4"),
            *("--dataset", sotu().calibration, "--num-samples", "16", "--force"),
        )
        name_parent(output, dense)
    return output


def questions(model: Path) -> list[Question]:
    """Prompts from held-out text: short ones, and long ones that are read in several chunks."""
    from transformers import AutoTokenizer

    text = AutoTokenizer.from_pretrained(model).encode(sotu().held_out.read_text()[:60_000])
    sizes = [(3 + 5 * i, 8 + 3 * (i % 8)) for i in range(16)]
    sizes += [(400, 8), (700, 8), (CONTEXT - 9, 8)]
    starts = [(617 * i) % (len(text) - CONTEXT) for i in range(len(sizes))]
    return [
        Question(tuple(text[start : start + length]), tokens)
        for start, (length, tokens) in zip(starts, sizes, strict=True)
    ]


def read_metrics(base_url: str) -> dict[str, float]:
    """What the server's metrics endpoint says of requests and cache, summed over labels."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=30) as response:
        text = response.read().decode()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name in (*IDLE, "vllm:request_success_total", "vllm:generation_tokens_total"):
                found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def settled_metrics(base_url: str) -> dict[str, float]:
    """The metrics once the server has nothing to do, or as they are after `SETTLE_SECONDS`."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        metrics = read_metrics(base_url)
        if all(metrics.get(name) == 0 for name in IDLE) or time.monotonic() > deadline:
            return metrics
        time.sleep(0.5)


def soak(server: Server, dtype: str, clients: int, seconds: float) -> Soaked:
    """Ask every question alone in float32, send traffic, look whether the server is idle again."""
    port = server.base_url.removesuffix("/v1").rpartition(":")[2]
    (process,) = (one for one in psutil.Process().children() if port in one.cmdline())
    asked = questions(server.model)
    model = str(server.model)
    expected = {}
    if dtype == "float32":
        alone = Traffic(server.base_url, model, CONTEXT, asked, {})
        expected = asyncio.run(alone.ask_singly())
    traffic = Traffic(server.base_url, model, CONTEXT, asked, expected)
    with watched(process) as memory:
        start = time.monotonic()
        tally = asyncio.run(traffic.run(clients, seconds))
        taken = time.monotonic() - start
    metrics = settled_metrics(server.base_url)
    return Soaked(dtype, server.backend_line(), taken, tally, memory, metrics)


def summary(records: Sequence[Soaked]) -> str:
    """The last line: what was sent, and what was wrong."""
    parts = []
    for record in records:
        tally, (before, after) = record.tally, record.memory.growth()
        parts.append(
            f"{record.dtype} {tally.requests} requests ({tally.completed} completed, "
            f"{tally.cancelled} cancelled, {tally.refused} refused), {len(tally.errors)} errors, "
            f"{len(tally.wrong)} of {tally.compared} wrong, memory {after - before:+.0f} MiB"
        )
    wrong = sum(len(record.failures()) for record in records)
    return f"soak: {'; '.join(parts)}: " + (f"{wrong} failures" if wrong else "passed")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120, help="of traffic for each dtype")
    parser.add_argument("--clients", type=int, default=12, help="requests at the same time")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    with new_result(parser, options.json):
        return _soaked(options)


def _soaked(options: argparse.Namespace) -> int:
    begun = revision()
    model = checkpoint()
    start = time.monotonic()
    records: list[Soaked] = []
    for dtype in DTYPES:
        print(f"{dtype}: vllm serve {model.name}", flush=True)
        with serve(model, "--dtype", dtype, *ARGUMENTS) as server:
            records.append(soak(server, dtype, options.clients, options.seconds))
        for failure in records[-1].failures():
            print(failure[:600], flush=True)
        facts = {
            "model": model.name,
            "clients": options.clients,
            "seconds": round(time.monotonic() - start),
        }
        phases = [record.to_dict() for record in records]
        write_json(options.json, {**facts, "phases": phases}, begun)
    print(summary(records))
    return 1 if any(record.failures() for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
