"""Perplexity of every method and pattern on SmolLM2-135M, on text that no calibration saw.

python -m benchmarks.accuracy --json OUT
python -m benchmarks.accuracy --methods wanda wanda+cp --patterns 4:8 --json OUT
"""

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .machine import write_json
from .models import smollm2
from .offline import evaluate, permllm_offline
from .texts import sotu

METHODS = ("magnitude", "wanda", "wanda+cp", "permllm-wanda")
PATTERNS = ("2:4", "4:8")
SEQUENCE_LENGTH = 512


def measure(
    methods: Sequence[str], patterns: Sequence[str], windows: int, seed: int
) -> list[dict[str, Any]]:
    """Prune and evaluate each combination; the first row is the dense model."""
    model, texts = smollm2(), sotu()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="permllm-accuracy-") as directory:
        record = Path(directory) / "eval.json"

        def add(name: str, pattern: str | None, checkpoint: Path, seconds: float) -> None:
            perplexity = evaluate(checkpoint, texts.held_out, record, windows=windows)
            dense = rows[0]["perplexity"] if rows else perplexity
            rows.append(
                {
                    "method": name,
                    "pattern": pattern,
                    "perplexity": perplexity,
                    "ratio": perplexity / dense,
                    "prune_seconds": round(seconds, 1),
                }
            )

        add("dense", None, model, 0.0)
        for pattern in patterns:
            for method in methods:
                checkpoint = Path(directory) / "checkpoint"
                start = time.perf_counter()
                permllm_offline(
                    *("prune", model, "--output", checkpoint, "--force"),
                    *("--method", method, "--pattern", pattern, "--seed", str(seed)),
                    *("--dataset", texts.calibration),
                    *("--sequence-length", str(SEQUENCE_LENGTH)),
                )
                add(method, pattern, checkpoint, time.perf_counter() - start)
    return rows


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title="SmolLM2-135M-Instruct, held-out State of the Union addresses")
    for column in ("method", "pattern", "perplexity", "x dense", "prune s"):
        table.add_column(column, justify="left" if column in ("method", "pattern") else "right")
    for row in rows:
        table.add_row(
            row["method"],
            row["pattern"] or "-",
            f"{row['perplexity']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['prune_seconds']:.0f}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--windows", type=int, default=64, help="held-out windows of 512 tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    arguments = parser.parse_args()
    rows = measure(arguments.methods, arguments.patterns, arguments.windows, arguments.seed)
    show(rows)
    record = {"model": "SmolLM2-135M-Instruct", "sequence_length": SEQUENCE_LENGTH}
    record |= {"windows": arguments.windows, "seed": arguments.seed}
    write_json(arguments.json, record | {"rows": rows})


if __name__ == "__main__":
    main()
