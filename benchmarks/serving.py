"""Decode and prefill speed in vLLM: dense, 2:4 sparse, and vLLM's own int8 and int4.

All engines are up at the same time and take turns, call by call; medians are reported, and ratios
to dense in the same run. `--bench` adds vLLM's own `vllm bench latency`, `throughput` and `serve`,
variant after variant.

    python -m benchmarks.serving --json OUT
    python -m benchmarks.serving --model llama-3.2-1b --compiled --json OUT --plot OUT.svg
    python -m benchmarks.serving --model llama-2-7b --one-at-a-time --batch 1 --json OUT
    python -m benchmarks.serving --dense DIR --sparse DIR --batch 1 8 --json OUT
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import quantized_peers, vllm_bench
from .engines import Engine, alternate
from .machine import machine_class, write_json
from .models import LLAMA_SHAPES, random_llama, smollm2, word_tokenizer
from .offline import magnitude_pruned

DENSE = "dense bfloat16"
VARIANTS: Mapping[str, Callable[[Path], Path]] = {
    DENSE: lambda dense: dense,
    "2:4 bfloat16": magnitude_pruned,
    "2:4 int8": lambda dense: magnitude_pruned(dense, values="int8"),
    "vLLM int8 (W8A8)": quantized_peers.int8,
    "vLLM int4 (GPTQ)": quantized_peers.int4,
}
CELLS = ((1, 32), (8, 32), (32, 32), (1, 512))
"""Batch and prompt tokens of the default run."""
OUTPUT_TOKENS = 32


def compare(
    models: Mapping[str, Path],
    cells: Sequence[tuple[int, int]],
    *,
    eager: bool = True,
    repeats: int = 5,
    one_at_a_time: bool = False,
    record: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
) -> list[dict[str, Any]]:
    """Serve variants, the first of them dense; one row per cell and variant, with ratios to it.

    `one_at_a_time` is for models that do not fit into memory together: no turns are taken then.
    `record` is given the rows so far whenever there are more.
    """
    rows: list[dict[str, Any]] = []
    groups = [{name: path} for name, path in models.items()] if one_at_a_time else [dict(models)]
    dense = next(iter(models))
    for group in groups:
        engines = {name: Engine(path, eager=eager) for name, path in group.items()}
        for batch, prompt in cells:
            rows += alternate(engines, batch, prompt, OUTPUT_TOKENS, repeats)
            rows.sort(key=lambda row: cells.index((row["batch"], row["prompt_tokens"])))
            record(_with_ratios(rows, dense))
        for engine in engines.values():
            engine.close()
    return rows


def _with_ratios(rows: Sequence[dict[str, Any]], dense: str) -> list[dict[str, Any]]:
    """Add how many times as fast as dense a row is, and its share of dense's memory."""
    base = {(row["batch"], row["prompt_tokens"]): row for row in rows if row["variant"] == dense}
    for row in rows:
        other = base[row["batch"], row["prompt_tokens"]]
        speed, wait = "decode_tokens_per_second", "time_to_first_token_ms"
        row["decode_ratio"] = row[speed] / other[speed]
        row["first_token_ratio"] = other[wait] / row[wait]
        row["resident_ratio"] = row["resident_mib"] / other["resident_mib"]
    return list(rows)


def bench(models: Mapping[str, Path], tokenizer: Path, *, eager: bool) -> list[dict[str, Any]]:
    """Run vLLM's own benchmarks on every variant, one after the other."""
    return [
        {
            "variant": name,
            "latency": vllm_bench.latency(path, eager=eager),
            "throughput": vllm_bench.throughput(path, eager=eager, tokenizer=tokenizer),
            "serve": vllm_bench.online(path, eager=eager, tokenizer=tokenizer),
        }
        for name, path in models.items()
    ]


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """Print the rows as a table."""
    table = Table(title=title)
    for column in (
        *("variant", "batch", "prompt", "decode tokens/s", "x dense", "first token ms", "x dense"),
        *("resident MiB", "load s"),
    ):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            str(row["batch"]),
            str(row["prompt_tokens"]),
            f"{row['decode_tokens_per_second']:.1f}",
            f"{row['decode_ratio']:.2f}",
            f"{row['time_to_first_token_ms']:.0f}",
            f"{row['first_token_ratio']:.2f}",
            f"{row['resident_mib']:.0f}",
            f"{row['load_seconds']:.0f}",
        )
    Console(width=120).print(table)


def show_bench(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print what vLLM's own benchmarks found."""
    table = Table(title="vllm bench")
    for column in ("variant", "latency s", "throughput tokens/s", "serve tokens/s", "TTFT", "TPOT"):
        table.add_column(column, justify="left" if column == "variant" else "right")
    for row in rows:
        table.add_row(
            row["variant"],
            f"{row['latency']['seconds']:.2f}",
            f"{row['throughput']['tokens_per_second']:.1f}",
            f"{row['serve']['tokens_per_second']:.1f}",
            f"{row['serve']['median_ttft_ms']:.0f} ms",
            f"{row['serve']['median_tpot_ms']:.0f} ms",
        )
    Console(width=120).print(table)


def plot(rows: Sequence[Mapping[str, Any]], title: str, output: Path) -> None:
    """Draw decode speed against dense, a group of bars per cell."""
    from matplotlib.figure import Figure

    variants = list(dict.fromkeys(row["variant"] for row in rows))
    cells = list(dict.fromkeys((row["batch"], row["prompt_tokens"]) for row in rows))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(variants)
    for number, variant in enumerate(variants):
        ratios = [row["decode_ratio"] for row in rows if row["variant"] == variant]
        places = [cell + (number - (len(variants) - 1) / 2) * width for cell in range(len(cells))]
        axes.bar(places, ratios, width, label=variant)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(cells)), [f"batch {batch}\nprompt {n}" for batch, n in cells])
    axes.set_ylabel("decode tokens/s, times dense")
    axes.set_title(title)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", *LLAMA_SHAPES], default="tinyllama")
    parser.add_argument("--dense", type=Path, help="dense checkpoint, in place of --model")
    parser.add_argument("--sparse", type=Path, help="its permllm checkpoint, in place of variants")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME",
        help=f"of {', '.join(map(repr, VARIANTS))} (default: all); dense comes first",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, nargs="+", help="batches to measure (default: 1 8 32)")
    parser.add_argument("--prompt", type=int, nargs="+", help="prompt tokens (default: 32 512)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--one-at-a-time", action="store_true", help="for models that fill memory")
    parser.add_argument("--bench", action="store_true", help="run vLLM's own benchmarks too")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--plot", type=Path, help="where a plot is written: .svg, .png or .pdf")
    arguments = parser.parse_args()
    if (arguments.dense is None) != (arguments.sparse is None):
        parser.error("--dense and --sparse go together: give both, or neither")
    eager = not arguments.compiled
    if arguments.dense is not None:
        dense = arguments.dense
        models = {DENSE: dense, "2:4": arguments.sparse}
    else:
        dense = smollm2() if arguments.model == "smollm2" else random_llama(arguments.model)
        names = [DENSE, *(name for name in arguments.variants if name != DENSE)]
        models = {name: VARIANTS[name](dense) for name in names}
    cells = [
        (batch, prompt)
        for batch, prompt in CELLS
        if batch in (arguments.batch or [batch]) and prompt in (arguments.prompt or [prompt])
    ]
    result: dict[str, Any] = {
        "model": dense.name,
        "eager": eager,
        "in_turn": not arguments.one_at_a_time,
    }
    rows = compare(
        models,
        cells,
        eager=eager,
        repeats=arguments.repeats,
        one_at_a_time=arguments.one_at_a_time,
        record=lambda rows: write_json(arguments.json, {**result, "rows": rows}),
    )
    result["rows"] = rows
    title = f"{dense.name} on {machine_class()}, {'eager' if eager else 'compiled'}"
    show(rows, title)
    if arguments.bench:
        result["vllm_bench"] = bench(models, word_tokenizer(dense), eager=eager)
        show_bench(result["vllm_bench"])
    write_json(arguments.json, result)
    if arguments.plot is not None:
        plot(rows, title, arguments.plot)


if __name__ == "__main__":
    main()
