"""Where the time of a decoded token goes: the linear layers, the head, attention, and the rest.

An engine as `vllm serve` starts it, eager: processes of its own, as many kernel threads as vLLM
gives them, one core reserved. One sequence, or several; a stopwatch in the worker adds up the time
of parts.

    python -m benchmarks.decode_profile --json OUT
    python -m benchmarks.decode_profile --model llama-3.2-1b --json OUT
    python -m benchmarks.decode_profile --sequences 32 --json OUT
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.table import Table

from .cpu.conditions import conditions, warn
from .engines.engine import RESERVED_CORES, Engine
from .engines.step_parts import AROUND_EXPERTS, EXPERTS, watch, watched
from .models import SHAPES, random_model
from .pruning.commands import magnitude_pruned
from .records.machine import revision, write_json
from .records.result_file import new_result

PROMPT_TOKENS, OUTPUT_TOKENS = 32, 65


def profile(engine: Engine, sequences: int) -> dict[str, Any]:
    """Milliseconds of one step of decoding by part under `rows`: means, whose sum is the whole.

    It gives each of the sequences a token. Of a model without experts, their parts are left
    out. `unwatched_ms` is what a step took before the stopwatch was there.
    """
    size = sequences, PROMPT_TOKENS, OUTPUT_TOKENS
    engine.answers(*size)
    before = engine.answers(*size)
    engine.of_worker(watch)
    engine.answers(*size)
    # The first steps read the prompts; the one of the last token, which no other follows, is left.
    steps = engine.of_worker(watched)[2 - OUTPUT_TOKENS :]
    rows = [
        {"part": part, "milliseconds": 1e3 * mean(step[part] for step in steps)}
        for part in steps[0]
        if part not in (EXPERTS, AROUND_EXPERTS) or any(step[part] for step in steps)
    ]
    unwatched = 1e3 * sequences / before.decode_tokens_per_second
    return {"unwatched_ms": round(unwatched, 1), "rows": rows}


def show(rows: list[Mapping[str, Any]]) -> None:
    """Print the parts as a table."""
    table = Table(title="one step of decoding")
    for column in ("part", "ms", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    total = sum(row["milliseconds"] for row in rows)
    for row in rows:
        milliseconds = row["milliseconds"]
        table.add_row(row["part"], f"{milliseconds:.2f}", f"{milliseconds / total:.0%}")
    table.add_row("together", f"{total:.2f}", "100%")
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--values", choices=["dense", "auto", "int8", "int4"], default="int8")
    parser.add_argument("--sequences", type=int, default=1, help="default: 1")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    with new_result(parser, options.json):
        _measure(options)


def _measure(options: argparse.Namespace) -> None:
    begun = revision()
    warn()
    model = random_model(options.model)
    if options.values != "dense":
        model = magnitude_pruned(model, values=options.values)
    engine = Engine(model, eager=True)
    try:
        found = profile(engine, options.sequences)
        facts = {
            "model": options.model,
            "values": options.values,
            "sequences": options.sequences,
            "threads": engine.facts()["threads"],
            "reserved_cores": os.environ.get(RESERVED_CORES, "by default"),
            **conditions(),
        }
    finally:
        engine.close()
    show(found["rows"])
    write_json(options.json, {**facts, **found}, begun)


if __name__ == "__main__":
    main()
