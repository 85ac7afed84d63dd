"""vLLM's own benchmarks, `vllm bench latency | throughput | serve`, run as a user runs them."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.engines.engine import ENVIRONMENT, reason
from benchmarks.engines.kv_cache import kv_cache_environment
from benchmarks.engines.memory_watch import MemoryWatch
from benchmarks.engines.server import serve
from benchmarks.engines.serving_rows import with_ratios
from benchmarks.records.rows import Rows

VLLM = str(Path(sys.executable).with_name("vllm"))
PROMPTS = 16
BENCHMARKS = ("latency", "throughput", "serve")


def alternate(
    variants: Sequence[str],
    rows: Rows,
    measure: Callable[[str, str], Mapping[str, float]],
    rounds: int,
    *,
    dense: str | None = None,
) -> None:
    """Add what `rows` lack: one of each benchmark, variant and round, variants in turn.

    Args:
        variants: names.
        rows: with the fields of `serving_rows.KEY`; a variant that was refused there is not tried.
        measure: gives what a benchmark says of a variant; a RuntimeError is why it does not run.
        rounds: how often everything is measured.
        dense: the variant to which the ratios of a round are, by default the first.
    """
    dense = variants[0] if dense is None else dense
    for turn, benchmark, variant in itertools.product(range(rounds), BENCHMARKS, variants):
        if (benchmark, variant, None, None, turn) in rows:
            continue
        row: dict[str, Any] = {"benchmark": benchmark, "variant": variant, "round": turn}
        refused = {row["variant"]: row["refused"] for row in rows.all() if "refused" in row}
        if variant in refused:
            row["refused"] = refused[variant]
        else:
            try:
                row |= measure(benchmark, variant)
            except RuntimeError as error:
                row["refused"] = reason(str(error), error)
        row["load_average"] = round(os.getloadavg()[1], 1)
        base = rows.get((benchmark, dense, None, None, turn))
        rows.add(with_ratios(row, row if variant == dense else base))


def measured(
    benchmark: str,
    model: Path,
    tokenizer: Path,
    *,
    eager: bool,
    memory_limit: float | None = None,
) -> dict[str, float]:
    """What one of `BENCHMARKS` says.

    Args:
        benchmark: its name.
        model: the checkpoint.
        tokenizer: the folder that has one.
        eager: whether nothing is compiled.
        memory_limit: GiB beyond which its processes are ended; see `MemoryWatch`.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    with MemoryWatch(memory_limit) as watch:
        try:
            return _measured(benchmark, model, tokenizer, eager)
        except RuntimeError as error:
            raise RuntimeError(watch.exceeded or str(error)) from error


def _measured(benchmark: str, model: Path, tokenizer: Path, eager: bool) -> dict[str, float]:
    if benchmark == "latency":
        return latency(model, eager=eager)
    if benchmark == "throughput":
        return throughput(model, eager=eager, tokenizer=tokenizer)
    return online(model, eager=eager, tokenizer=tokenizer)


def latency(model: Path, *, eager: bool, batch: int = 1) -> dict[str, float]:
    """Seconds of one batch of answers: prompts of 32 tokens, answers of 32."""
    result = _bench(
        *("latency", "--model", str(model), "--skip-tokenizer-init", *_engine_options(eager)),
        *("--batch-size", str(batch), "--input-len", "32", "--output-len", "32"),
        *("--num-iters-warmup", "1", "--num-iters", "5"),
        output_option="--output-json",
    )
    return {"seconds": float(result["percentiles"]["50"])}


def throughput(model: Path, *, eager: bool, tokenizer: Path) -> dict[str, float]:
    """Tokens per second, prompts included, over 16 requests at once."""
    result = _bench(
        *("throughput", "--model", str(model), "--tokenizer", str(tokenizer)),
        *_engine_options(eager),
        *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "32"),
        *("--num-prompts", str(PROMPTS)),
        output_option="--output-json",
    )
    return {"tokens_per_second": float(result["tokens_per_second"])}


def online(model: Path, *, eager: bool, tokenizer: Path) -> dict[str, float]:
    """Speed that 16 clients of a live `vllm serve` see: output tokens/s, medians of TTFT, TPOT."""
    options = (*_engine_options(eager), "--tokenizer", str(tokenizer))
    with serve(model, *options) as server:
        host, _, port = server.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
        result = _bench(
            *("serve", "--backend", "vllm", "--host", host, "--port", port),
            *("--model", str(model), "--tokenizer", str(tokenizer)),
            *("--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "32"),
            *("--num-prompts", str(PROMPTS), "--request-rate", "inf", "--ignore-eos"),
            "--save-result",
            output_option="--result-filename",
        )
    return {
        "tokens_per_second": float(result["output_throughput"]),
        "median_ttft_ms": float(result["median_ttft_ms"]),
        "median_tpot_ms": float(result["median_tpot_ms"]),
    }


def _engine_options(eager: bool) -> tuple[str, ...]:
    options = ("--dtype", "bfloat16", "--max-model-len", "1024")
    return (*options, "--enforce-eager") if eager else options


def _bench(*arguments: str, output_option: str) -> dict[str, Any]:
    """Run `vllm bench` and return what it wrote; raises RuntimeError with its last lines."""
    with tempfile.TemporaryDirectory() as directory:
        output = Path(directory) / "result.json"
        done = subprocess.run(
            [VLLM, "bench", *arguments, output_option, str(output)],
            env={**os.environ, **ENVIRONMENT, **kv_cache_environment()},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode or not output.exists():
            lines = (done.stdout + done.stderr).splitlines()[-30:]
            raise RuntimeError(f"vllm bench {arguments[0]} failed:\n" + "\n".join(lines))
        result: dict[str, Any] = json.loads(output.read_text())
        return result
