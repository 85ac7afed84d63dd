"""Decode and prefill speed in vLLM, dense against sparse, alternating call by call.

Both engines are up at the same time and take turns, so that whatever else the machine does falls on
both; medians are reported. Decode speed is (output - 1) tokens over the time that is left when the
time of a one-token answer is taken off.

    python -m benchmarks.serving --json OUT
    python -m benchmarks.serving --dense DIR --sparse DIR --batch 1 8 --json OUT
"""

import argparse
import os
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .machine import machine_class, write_json
from .models import random_llama
from .offline import magnitude_pruned

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


class Engine:
    """A vLLM engine in a process of its own that answers with a fixed number of tokens."""

    def __init__(self, model: Path, *, eager: bool) -> None:
        from vllm import LLM

        start = time.perf_counter()
        self._llm = LLM(
            model=str(model),
            dtype="bfloat16",
            enforce_eager=eager,
            max_model_len=1024,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            disable_log_stats=True,
        )
        self.load_seconds = time.perf_counter() - start

    def seconds(self, batch: int, prompt: int, output: int) -> float:
        """Wall time of `batch` answers of exactly `output` tokens to prompts of `prompt` tokens."""
        from vllm import SamplingParams, TokensPrompt

        prompts = [
            TokensPrompt(prompt_token_ids=[3 + (7 * i + 13 * j) % 30000 for j in range(prompt)])
            for i in range(batch)
        ]
        sampling = SamplingParams(
            temperature=0.0, max_tokens=output, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        self._llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start


def alternate(
    engines: Mapping[str, Engine], batch: int, prompt: int, output: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Measure every engine in turn, `repeats` times after one warm-up; yield a row for each."""
    first: dict[str, list[float]] = {name: [] for name in engines}
    whole: dict[str, list[float]] = {name: [] for name in engines}
    for repeat in range(repeats + 1):
        for name, engine in engines.items():
            times = engine.seconds(batch, prompt, 1), engine.seconds(batch, prompt, output)
            if repeat:
                first[name].append(times[0])
                whole[name].append(times[1])
    for name, engine in engines.items():
        decode = [w - f for w, f in zip(whole[name], first[name], strict=True)]
        yield {
            "variant": name,
            "batch": batch,
            "prompt_tokens": prompt,
            "output_tokens": output,
            "repeats": repeats,
            "decode_tokens_per_second": batch * (output - 1) / statistics.median(decode),
            "time_to_first_token_ms": 1e3 * statistics.median(first[name]),
            "load_seconds": engine.load_seconds,
        }


def compare(
    dense: Path, sparse: Path, batches: Sequence[int], *, eager: bool = True, repeats: int = 5
) -> list[dict[str, Any]]:
    """Serve two checkpoints side by side; one row per variant and batch, with ratios to dense."""
    os.environ.update(ENVIRONMENT)
    engines = {name: Engine(p, eager=eager) for name, p in (("dense", dense), ("sparse", sparse))}
    rows: list[dict[str, Any]] = []
    for batch in batches:
        group = list(alternate(engines, batch, prompt=32, output=32, repeats=repeats))
        for row in group:
            row["decode_ratio"] = (
                row["decode_tokens_per_second"] / group[0]["decode_tokens_per_second"]
            )
            row["first_token_ratio"] = (
                group[0]["time_to_first_token_ms"] / row["time_to_first_token_ms"]
            )
        rows += group
    return rows


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the rows as a table."""
    table = Table(title=title)
    for column in ("variant", "batch", "decode tokens/s", "x dense", "first token ms", "x dense"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            str(row["batch"]),
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_ratio']:.2f}",
            f"{row['time_to_first_token_ms']:.0f}",
            f"{row['first_token_ratio']:.2f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dense", type=Path, help="dense checkpoint (default: TinyLlama's shape)")
    parser.add_argument("--sparse", type=Path, help="its permllm checkpoint (default: made here)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    arguments = parser.parse_args()
    if (arguments.dense is None) != (arguments.sparse is None):
        parser.error("--dense and --sparse go together: give both, or neither")
    dense = arguments.dense or random_llama("tinyllama")
    sparse = arguments.sparse or magnitude_pruned(dense)
    rows = compare(
        dense, sparse, arguments.batch, eager=not arguments.compiled, repeats=arguments.repeats
    )
    show(rows, f"{dense.name} on {machine_class()}")
    write_json(arguments.json, {"model": dense.name, "eager": not arguments.compiled, "rows": rows})


if __name__ == "__main__":
    main()
