"""vLLM's own benchmarks, `vllm bench latency | throughput | serve`, run as a user runs them."""

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from benchmarks.cpu.conditions import conditions
from benchmarks.engines.engine import ENVIRONMENT, reason
from benchmarks.engines.kv_cache import kv_cache_environment
from benchmarks.engines.memory_watch import MemoryWatch
from benchmarks.engines.plugin_options import plugin_options
from benchmarks.engines.server import serve
from benchmarks.engines.serving_rows import OUTPUT_TOKENS, repeats_of, with_ratios
from benchmarks.records.rows import Rows

VLLM = str(Path(sys.executable).with_name("vllm"))
BENCHMARKS = ("latency", "throughput", "serve")
Cell = tuple[int, int]
"""Sequences at a time, and tokens of each prompt."""


def alternate(
    variants: Sequence[str],
    cells: Sequence[Cell],
    rows: Rows,
    measure: Callable[[str, str, Cell], Mapping[str, Any]],
    rounds: int,
    *,
    dense: str | None = None,
) -> None:
    """Add what `rows` lack: one of each benchmark, cell, variant and round, variants in turn.

    Args:
        variants: names.
        cells: what is measured of each.
        rows: with the fields of `serving_rows.KEY`; a variant that was refused there in a cell is
            not tried in it.
        measure: gives what a benchmark says of a variant and a cell; a RuntimeError is why it does
            not run.
        rounds: how often everything is measured.
        dense: the variant to which the ratios of a round are, by default the first. Where its row
            is there and another's is not, it is measured again, for the ratios alone.
    """
    dense = variants[0] if dense is None else dense
    for turn, benchmark, cell in itertools.product(range(rounds), BENCHMARKS, cells):
        lacking = [name for name in variants if (benchmark, name, *cell, turn) not in rows]
        run = any(_refused(rows, name, cell) is None for name in lacking)
        base = None
        for variant in sorted(variants, key=lambda name: name != dense):
            if variant not in lacking and not (run and variant == dense):
                continue
            batch, prompt = cell
            row: dict[str, Any] = {"benchmark": benchmark, "variant": variant, "round": turn}
            row |= {"batch": batch, "prompt_tokens": prompt, "output_tokens": OUTPUT_TOKENS}
            row |= _said(rows, measure, benchmark, variant, cell)
            row |= conditions()
            base = row if variant == dense else base
            if variant in lacking:
                rows.add(with_ratios(row, base))


def _said(
    rows: Rows,
    measure: Callable[[str, str, Cell], Mapping[str, Any]],
    benchmark: str,
    variant: str,
    cell: Cell,
) -> Mapping[str, Any]:
    """What a benchmark says, or why there is nothing under `refused`."""
    refused = _refused(rows, variant, cell)
    if refused is not None:
        return {"refused": refused}
    try:
        return measure(benchmark, variant, cell)
    except RuntimeError as error:
        return {"refused": reason(str(error), error)}


def _refused(rows: Rows, variant: str, cell: Cell) -> str | None:
    """Why a variant was refused in a cell before."""
    place = variant, *cell
    found = (row for row in rows.all() if "refused" in row)
    return next(
        (
            row["refused"]
            for row in found
            if (row["variant"], row.get("batch"), row.get("prompt_tokens")) == place
        ),
        None,
    )


def measured(
    benchmark: str,
    model: Path,
    tokenizer: Path,
    cell: Cell,
    *,
    eager: bool,
    dtype: str = "bfloat16",
    head: str = "dense",
    memory_limit: float | None = None,
) -> dict[str, float]:
    """What one of `BENCHMARKS` says.

    Args:
        benchmark: its name.
        model: the checkpoint.
        tokenizer: the folder that has one.
        cell: what is measured.
        eager: whether nothing is compiled.
        dtype: of the activations.
        head: of the plugin's options.
        memory_limit: GiB beyond which its processes are ended; see `MemoryWatch`.

    Raises:
        RuntimeError: it failed; with its last lines.
    """
    options = _engine_options(eager, dtype, head)
    with closing(MemoryWatch(memory_limit)) as watch:
        try:
            if benchmark == "latency":
                return latency(model, cell, options)
            if benchmark == "throughput":
                return throughput(model, cell, options, tokenizer)
            return online(model, cell, options, tokenizer)
        except RuntimeError as error:
            raise RuntimeError(watch.exceeded or str(error)) from error


def latency(model: Path, cell: Cell, options: Sequence[str]) -> dict[str, float]:
    """Seconds of one batch of answers, the median."""
    batch, prompt = cell
    result = _bench(
        *("latency", "--model", str(model), "--skip-tokenizer-init", *options),
        *("--batch-size", str(batch), "--input-len", str(prompt)),
        *("--output-len", str(OUTPUT_TOKENS)),
        *("--num-iters-warmup", "1", "--num-iters", str(repeats_of(*cell))),
        output_option="--output-json",
    )
    return {"seconds": float(result["percentiles"]["50"])}


def throughput(
    model: Path, cell: Cell, options: Sequence[str], tokenizer: Path
) -> dict[str, float]:
    """Tokens per second, prompts included, over requests of which a batch runs at a time."""
    result = _bench(
        *("throughput", "--model", str(model), "--tokenizer", str(tokenizer)),
        *(*options, "--max-num-seqs", str(cell[0]), *_requests(cell)),
        output_option="--output-json",
    )
    return {"tokens_per_second": float(result["tokens_per_second"])}


def online(model: Path, cell: Cell, options: Sequence[str], tokenizer: Path) -> dict[str, float]:
    """What as many clients of a live `vllm serve` see as a batch has sequences.

    Output tokens per second, and medians of the times to the first token and to each further one.
    """
    with serve(model, *options, "--tokenizer", str(tokenizer)) as server:
        host, _, port = server.base_url.removeprefix("http://").removesuffix("/v1").partition(":")
        result = _bench(
            *("serve", "--backend", "vllm", "--host", host, "--port", port),
            *("--model", str(model), "--tokenizer", str(tokenizer), *_requests(cell)),
            *("--max-concurrency", str(cell[0]), "--request-rate", "inf", "--ignore-eos"),
            "--save-result",
            output_option="--result-filename",
        )
    return {
        "tokens_per_second": float(result["output_throughput"]),
        "median_ttft_ms": float(result["median_ttft_ms"]),
        "median_tpot_ms": float(result["median_tpot_ms"]),
    }


def _requests(cell: Cell) -> tuple[str, ...]:
    batch, prompt = cell
    lengths = ("--random-input-len", str(prompt), "--random-output-len", str(OUTPUT_TOKENS))
    return ("--dataset-name", "random", *lengths, "--num-prompts", str(batch * repeats_of(*cell)))


def _engine_options(eager: bool, dtype: str, head: str) -> tuple[str, ...]:
    options: tuple[str, ...] = ("--dtype", dtype, "--max-model-len", "1024")
    if asked := plugin_options(head):
        options += ("--additional-config", json.dumps(asked))
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
