"""Decode and prefill speed in vLLM: dense, 2:4 sparse, and vLLM's own int8 and int4.

All engines are up at the same time and take turns, call by call; medians are reported, and ratios
to dense in the same run.

    python -m benchmarks.serving --json OUT
    python -m benchmarks.serving --model llama-3.2-1b --compiled --json OUT --plot OUT.svg
    python -m benchmarks.serving --model llama-2-7b --variants "2:4 int8" --memory-limit 8 \\
        --cells 1x32 1x512 --json OUT
    python -m benchmarks.serving --variants "dense bfloat16" "2:4 int8" "2:4 int8, int8 head" \\
        --cells 1x32 8x32 --json OUT
    python -m benchmarks.serving --variants "dense bfloat16" "dense float16" \\
        "2:4 bfloat16 (float16)" --cells 1x32 --json OUT
    python -m benchmarks.serving --variants "dense bfloat16" "dense float32" "2:4 int8" \\
        --cells 1x32 --json OUT    # where the CPU multiplies no bfloat16
    python -m benchmarks.serving --variants "2:4 int8" "llama.cpp Q8_0" "llama.cpp Q4_0" \\
        --llama-cpp ../llama.cpp/build/bin --cells 1x32 --json OUT
    python -m benchmarks.serving --dense DIR --sparse DIR --cells 1x32 8x32 --json OUT

Without the dense variant nothing loads it, and there are no ratios. The result is written after
each cell, and what it holds already is not measured again: `--cells` adds to it. A variant
that does not start or that ends has rows that say why under `refused`, and the rest goes on; it is
tried again when those rows are taken out of the file.
"""

import argparse
import json
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from .cpu.conditions import warn
from .engines import llama_cpp, quantized_peers
from .engines.engine import RESERVED_CORES, Engine, NoEngine, Running, alternate
from .engines.gguf_twin import gguf_twin
from .engines.identity import identity
from .engines.kv_cache import DEFAULT_GIB, KV_CACHE, kv_cache_gib
from .engines.serving_plots import save_figure
from .engines.serving_report import show
from .engines.serving_rows import (
    DENSE,
    INT4,
    INT8,
    KEY,
    OUTPUT_TOKENS,
    repeats_of,
    with_ratios,
)
from .engines.weight_bytes import DecodedWeights, of_checkpoint
from .models import SHAPES, random_model, smollm2
from .pruning.commands import ended, magnitude_pruned
from .records.machine import machine_class
from .records.result_file import kept_rows
from .records.rows import Rows

VARIANTS: Mapping[str, Callable[[Path], Path]] = {
    DENSE: lambda dense: dense,
    "2:4 bfloat16": magnitude_pruned,
    "2:4 int8": lambda dense: magnitude_pruned(dense, values="int8"),
    INT8: partial(quantized_peers.made_apart, "int8"),
    INT4: partial(quantized_peers.made_apart, "int4"),
}

MORE: Mapping[str, Callable[[Path], Path]] = {
    "2:4 int4": lambda dense: magnitude_pruned(dense, values="int4"),
}
"""Only when asked for."""


@dataclass(frozen=True)
class Variation:
    """How the checkpoint of another variant is served."""

    of: str
    dtype: str = "bfloat16"
    head: str = "dense"


VARIATIONS: Mapping[str, Variation] = {
    "2:4 int8, int8 head": Variation("2:4 int8", head="int8"),
    "2:4 int4, int8 head": Variation("2:4 int4", head="int8"),
    "dense float32": Variation(DENSE, dtype="float32"),
    "dense float16": Variation(DENSE, dtype="float16"),
    "2:4 bfloat16 (float16)": Variation("2:4 bfloat16", dtype="float16"),
    "2:4 int8 (float16)": Variation("2:4 int8", dtype="float16"),
}
"""With an output head of int8, or activations of another dtype; only when asked for."""
EVERY = (*VARIANTS, *MORE, *VARIATIONS, *llama_cpp.VARIANTS)
DEFAULT_MODEL = "tinyllama"
CELLS = tuple((batch, prompt) for prompt in (32, 512) for batch in (1, 8, 32))
OLDER = {"kv_cache_gib": 1}
"""Settings of results that do not say them."""
SHAPE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "tie_word_embeddings"),
    *("num_experts", "num_experts_per_tok", "moe_intermediate_size"),
    *("n_routed_experts", "n_shared_experts", "q_lora_rank", "kv_lora_rank"),
    *("num_kv_shared_layers", "hidden_size_per_layer_input"),
)
"""What a result says of its model, from the configuration."""


def compare(
    variants: Sequence[str],
    cells: Sequence[tuple[int, int]],
    start: Callable[[str], Running],
    rows: Rows | None = None,
    *,
    dense: str | None = None,
    weights: DecodedWeights | None = None,
    repeats: int | None = None,
    one_at_a_time: bool = False,
    int4_group: int | None = None,
) -> list[dict[str, Any]]:
    """Serve variants; one row per cell and variant, with ratios to dense.

    Args:
        variants: names.
        cells: batch and prompt tokens.
        start: gives the engine of a variant; whatever it raises is why the variant is refused.
        rows: those that are there are kept, the others added after each cell.
        dense: the variant to which ratios are, by default the first; where it is not among
            `variants` it does not run, and only `one_at_a_time` takes it from `rows`.
        weights: of the dense model, for what its bytes alone explain.
        repeats: of each cell; None for as many as its size allows.
        one_at_a_time: for models that do not fit into memory together: no turns are taken then.
        int4_group: values that share a scale in vLLM's int4, for what its bytes explain.
    """
    rows = Rows(None, {}, KEY) if rows is None else rows
    dense = variants[0] if dense is None else dense
    for group in [[name] for name in variants] if one_at_a_time else [list(variants)]:
        lacking = {cell: [name for name in group if (name, *cell) not in rows] for cell in cells}
        needed = {name for names in lacking.values() for name in (*names, dense) if names}
        engines = {name: _engine(start, name) for name in group if name in needed}
        try:
            for cell, names in lacking.items():
                turns = {name: e for name, e in engines.items() if name in names or name == dense}
                if names:
                    times = repeats or repeats_of(*cell)
                    found = {
                        row["variant"]: row for row in alternate(turns, *cell, OUTPUT_TOKENS, times)
                    }
                    kept = rows.get((dense, *cell)) if one_at_a_time else None
                    base = found.get(dense) or kept
                    rows.update(
                        with_ratios(found[name], base, weights, int4_group) for name in names
                    )
        finally:
            for engine in engines.values():
                engine.close()
    return rows.all()


def _engine(start: Callable[[str], Running], name: str) -> Running:
    try:
        return start(name)
    except subprocess.CalledProcessError as error:  # its message would be the whole command
        return NoEngine(ended("making its checkpoint", error.returncode))
    except Exception as error:
        return NoEngine(str(error) or type(error).__name__)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["smollm2", *SHAPES], help=f"default: {DEFAULT_MODEL}")
    parser.add_argument("--dense", type=Path, help="dense checkpoint, in place of --model")
    parser.add_argument("--sparse", type=Path, help="its permllm checkpoint, in place of variants")
    parser.add_argument(
        "--variants", nargs="+", choices=EVERY, metavar="NAME",
        help=f"of {', '.join(map(repr, VARIANTS))} (default: all of these), {', '.join(MORE)!r}, "
        "with an output head of int8 or activations of another dtype "
        f"{', '.join(map(repr, VARIATIONS))}, and without vLLM "
        f"{', '.join(map(repr, llama_cpp.VARIANTS))}",
    )  # fmt: skip
    parser.add_argument(
        "--llama-cpp", type=Path, metavar="DIR",
        help="where llama.cpp's programs are, its build/bin (default: on the PATH)",
    )  # fmt: skip
    parser.add_argument(
        "--cells", type=_cell, nargs="+", default=CELLS, metavar="BATCHxPROMPT",
        help="sequences and tokens of each prompt (default: 1, 8 and 32 of 32 and of 512)",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, help="of each cell (default: by its size, 5 to 1)")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument(
        "--reserved-cores", type=int, metavar="N",
        help=f"cores that vLLM leaves to its scheduler, {RESERVED_CORES} (default: vLLM's, 1)",
    )  # fmt: skip
    parser.add_argument(
        "--kv-cache", type=int, metavar="GIB",
        help=f"of each engine, a whole number (default: {KV_CACHE}, or {DEFAULT_GIB})",
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", type=float, metavar="GIB",
        help="of each engine: beyond it, its processes are ended and it is refused",
    )  # fmt: skip
    parser.add_argument("--one-at-a-time", action="store_true", help="for models that fill memory")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    parser.add_argument("--plot", type=Path, help="where a plot is written, an SVG")
    return parser


def _cell(text: str) -> tuple[int, int]:
    """Argument type: BATCHxPROMPT."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no cell: give sequences x tokens of each prompt, such as 8x512"
        )
    return int(found[1]), int(found[2])


def main() -> None:
    parser = _parser()
    arguments = parser.parse_args()
    if (arguments.dense is None) != (arguments.sparse is None):
        parser.error("--dense and --sparse go together: give both, or neither")
    if arguments.dense is not None and (arguments.model or arguments.variants):
        parser.error(
            "--dense and --sparse stand in place of --model and --variants: leave these out"
        )
    for folder in filter(None, (arguments.dense, arguments.sparse)):
        if not (folder / "config.json").exists():
            parser.error(f"{folder} is no checkpoint: it has no config.json")
    if arguments.memory_limit is not None and arguments.memory_limit <= 0:
        parser.error(f"--memory-limit {arguments.memory_limit:g}: give more than 0 GiB")
    if arguments.reserved_cores is not None:
        os.environ[RESERVED_CORES] = str(arguments.reserved_cores)
    if arguments.kv_cache is not None:
        os.environ[KV_CACHE] = str(arguments.kv_cache)
    try:
        kv_cache = kv_cache_gib()
    except ValueError as error:
        parser.error(str(error))
    if arguments.dense is not None:
        dense = arguments.dense
        makers = {DENSE: VARIANTS[DENSE], "2:4": lambda dense: arguments.sparse}
        given = {DENSE: dense, "2:4": arguments.sparse}
    else:
        name = arguments.model or DEFAULT_MODEL
        dense = smollm2() if name == "smollm2" else random_model(name)
        asked = arguments.variants or VARIANTS
        own = {**VARIANTS, **MORE}
        every = {**own, **{name: own[one.of] for name, one in VARIATIONS.items()}}
        every |= _of_llama_cpp(
            parser, [name for name in asked if name in llama_cpp.VARIANTS], arguments.llama_cpp
        )
        makers = {name: make for name, make in every.items() if name in asked}
        given = {DENSE: dense}  # the others are made of it
    eager = not arguments.compiled
    facts = {
        "model": dense.name,
        "shape": _shape(dense),
        "checkpoints": {name: identity(folder) for name, folder in given.items()},
        "mode": "eager" if eager else "compiled",
        "compile_cache": None if eager else "empty",
        "reserved_cores": os.environ.get(RESERVED_CORES, "by default"),
        "in_turn": not arguments.one_at_a_time,
        "kv_cache_gib": kv_cache,
        "memory_limit_gib": arguments.memory_limit,
    }
    title = f"{dense.name} on {machine_class()}, {facts['mode']}"
    with kept_rows(parser, arguments.json, facts, KEY, OLDER) as rows:
        _measure(arguments, dense, makers, rows)
        show(rows.all(), title)
        if arguments.plot is not None:
            save_figure({"rows": rows.all()}, arguments.plot, title)


def _measure(
    arguments: argparse.Namespace,
    dense: Path,
    makers: Mapping[str, Callable[[Path], Path]],
    rows: Rows,
) -> None:
    """Measure what the result lacks."""
    warn()
    eager = not arguments.compiled
    model = cache(lambda name: makers[name](dense))

    def start(name: str) -> Running:
        if name in llama_cpp.VARIANTS:
            return llama_cpp.LlamaCpp(
                llama_cpp.program(llama_cpp.BENCH, arguments.llama_cpp),
                model(name),
                threads=llama_cpp.threads_beside_vllm(),
                memory_limit=arguments.memory_limit,
            )
        return Engine(
            model(name),
            eager=eager,
            dtype=_served(name).dtype,
            head=_served(name).head,
            memory_limit=arguments.memory_limit,
        )

    compare(
        list(makers),
        arguments.cells,
        start,
        rows,
        dense=DENSE,
        weights=of_checkpoint(dense),
        repeats=arguments.repeats,
        one_at_a_time=arguments.one_at_a_time,
        int4_group=quantized_peers.int4_group(dense),
    )
    order = [*EVERY, *makers]
    rows.sort(lambda row: _place(row, order))


def _of_llama_cpp(
    parser: argparse.ArgumentParser, variants: Sequence[str], folder: Path | None
) -> dict[str, Callable[[Path], Path]]:
    """What makes the models of these variants; ends the program where llama.cpp is missing."""
    try:
        programs = [llama_cpp.program(name, folder) for name in llama_cpp.PROGRAMS if variants]
    except FileNotFoundError as error:
        parser.error(str(error))
    return {
        name: partial(gguf_twin, kind=llama_cpp.VARIANTS[name], quantize=programs[1])
        for name in variants
    }


def _served(variant: str) -> Variation:
    """How a variant is served."""
    return VARIATIONS.get(variant, Variation(variant))


def _shape(model: Path) -> dict[str, Any]:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    return {name: config[name] for name in SHAPE if name in config}


def _place(row: Mapping[str, Any], variants: Sequence[str]) -> tuple[Any, ...]:
    """Cells by prompt and batch, variants in their order."""
    names = [*variants, row["variant"]]
    return row["prompt_tokens"], row["batch"], names.index(row["variant"])


if __name__ == "__main__":
    main()
