"""Perplexity of every method and pattern on SmolLM2-135M, on text that no calibration saw.

    python -m benchmarks.accuracy --json OUT
    python -m benchmarks.accuracy --methods wanda+cp permllm-wanda/obs --patterns 4:8 --json OUT
    python -m benchmarks.accuracy --methods permllm-best --values int8 --json OUT
    python -m benchmarks.accuracy --quick --json OUT

METHOD/RECONSTRUCTION replaces the reconstruction of a method. Calibrated on State of the Union
addresses; evaluated on held-out ones (in domain) and on six novels (another domain). Rows that
depend on a seed beyond the choice of windows are repeated with every seed. The result is written
after each row, and rows that OUT already has are not made again.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from permllm_offline.evaluation import evaluation_windows, perplexity
from permllm_offline.loading import load_tokenizer, open_source
from permllm_offline.methods import METHODS
from permllm_offline.permutations import PERMUTATIONS
from permllm_offline.preparation import prepare
from permllm_offline.pruning import prune_model
from permllm_offline.recipe import EFFORTS, Recipe, make_recipe
from permllm_offline.reconstructions import RECONSTRUCTIONS

from .models import smollm2
from .offline import evaluate, permllm_offline
from .rows import Rows
from .texts import austen, sotu

PATTERNS = ("2:4", "4:8")
SEQUENCE_LENGTH = 512
VALUES = ("bfloat16", "int8")
KEY = ("method", "pattern", "seed", "values")
DENSE = ("dense", None, None, "bfloat16")
QUICK = {"methods": ["wanda", "wanda+cp", "permllm-best"], "patterns": ["2:4"], "windows": 16}


@dataclass(frozen=True)
class Row:
    """One pruned model; ``servable`` is false where no checkpoint can hold the permutation.

    ``processor_seconds`` is the time of all threads: other work on the machine does not add to it.
    """

    method: str
    pattern: str | None
    seed: int | None
    values: str
    perplexity: Mapping[str, float]
    ratio: Mapping[str, float]
    prune_seconds: float
    processor_seconds: float
    threads: int
    servable: bool = True


class Accuracy:
    """Prunes and evaluates in a folder of its own.

    Args:
        directory: for checkpoints and records, overwritten from row to row.
        windows: evaluation windows of each text.
        effort: of methods that distil.
    """

    def __init__(self, directory: Path, windows: int, effort: str) -> None:
        self._model, self._calibration = smollm2(), sotu().calibration
        self._texts = {"in domain": sotu().held_out, "novels": austen()}
        self._directory, self._windows, self._effort = directory, windows, effort

    def dense(self) -> Row:
        """The model before pruning."""
        found = self._perplexities(self._model)
        ones = dict.fromkeys(found, 1.0)
        return Row(*DENSE, found, ones, 0.0, 0.0, torch.get_num_threads())

    def pruned(
        self, name: str, pattern: str, seed: int, values: str, dense: Mapping[str, float]
    ) -> Row:
        """One row; ``name`` is METHOD or METHOD/RECONSTRUCTION, ``dense`` perplexity by text."""
        method, _, reconstruction = name.partition("/")
        start = time.perf_counter(), processor_time()
        if servable(name):
            self._bake(method, reconstruction, pattern, seed, values)
            stop = time.perf_counter(), processor_time()
            found = self._perplexities(self._directory / "checkpoint")
        else:
            model, recipe = self._in_memory(method, reconstruction, pattern, seed)
            stop = time.perf_counter(), processor_time()
            found = self._perplexities_in_memory(model, recipe)
        ratio = {domain: value / dense[domain] for domain, value in found.items()}
        wall, processor = (round(b - a, 1) for a, b in zip(start, stop, strict=True))
        times = (wall, processor, torch.get_num_threads())
        return Row(name, pattern, seed, values, found, ratio, *times, servable(name))

    def _bake(self, method: str, reconstruction: str, pattern: str, seed: int, values: str) -> None:
        permllm_offline(
            *("prune", self._model, "--output", self._directory / "checkpoint", "--force"),
            *("--method", method, "--pattern", pattern, "--seed", str(seed)),
            *(("--values", values) if values == "int8" else ()),
            *(("--reconstruction", reconstruction) if reconstruction else ()),
            *("--dataset", self._calibration, "--effort", self._effort),
            *("--sequence-length", str(SEQUENCE_LENGTH)),
        )

    def _in_memory(
        self, method: str, reconstruction: str, pattern: str, seed: int
    ) -> tuple[Any, Recipe]:
        options = {
            "model": str(self._model),
            "method": method,
            "reconstruction": reconstruction or None,
            "pattern": pattern,
            "seed": seed,
            "dataset": str(self._calibration),
            "sequence_length": SEQUENCE_LENGTH,
        }
        recipe = make_recipe(options, self._effort)
        return prune_model(recipe, prepare(recipe)).model, recipe

    def _perplexities(self, checkpoint: Path) -> dict[str, float]:
        record = self._directory / "eval.json"
        return {
            domain: evaluate(checkpoint, text, record, windows=self._windows)
            for domain, text in self._texts.items()
        }

    def _perplexities_in_memory(self, model: Any, recipe: Recipe) -> dict[str, float]:
        tokenizer = load_tokenizer(open_source(recipe.model))
        return {
            domain: perplexity(
                model, evaluation_windows(str(text), tokenizer, SEQUENCE_LENGTH, self._windows)
            )
            for domain, text in self._texts.items()
        }


def processor_time() -> float:
    """Seconds that the threads of this process and of those that it waited for have run."""
    return sum(os.times()[:4])


def seeds_of(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """Every seed where something is learned, else the first."""
    method, _, reconstruction = name.partition("/")
    parts = METHODS[method]
    kind = RECONSTRUCTIONS[reconstruction or parts.reconstruction]
    learned = PERMUTATIONS[parts.permutation].learn is not None or kind.model is not None
    return seeds if learned else seeds[:1]


def combinations(
    methods: Sequence[str],
    patterns: Sequence[str],
    seeds: Sequence[int],
    values: Sequence[str],
) -> Iterator[tuple[str, str, int, str]]:
    """Name, pattern, seed and values of each row, in the order of the table."""
    for pattern in patterns:
        for name in methods:
            for seed in seeds_of(name, seeds):
                for value_dtype in values:
                    if value_dtype == "bfloat16" or servable(name):
                        yield name, pattern, seed, value_dtype


def servable(name: str) -> bool:
    """Whether a checkpoint can hold the method's permutation."""
    return not PERMUTATIONS[METHODS[name.partition("/")[0]].permutation].across_blocks


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of a row in the table: dense first, then by pattern, method, values and seed."""
    if row["pattern"] is None:
        return ()
    method, _, reconstruction = row["method"].partition("/")
    number = list(METHODS).index(method)
    return row["pattern"], number, reconstruction, row["values"], row["seed"]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title="SmolLM2-135M-Instruct: perplexity, and its ratio to the dense model's")
    for column in ("method", "pattern", "seed", "values"):
        table.add_column(column)
    for column in ("in domain", "x dense", "novels", "x dense", "prune s"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["method"] if row["servable"] else f"{row['method']} (accuracy only)"]
        cells += [row["pattern"] or "-", "-" if row["seed"] is None else str(row["seed"])]
        cells.append(row["values"])
        for domain, value in row["perplexity"].items():
            cells += [f"{value:.1f}", f"{row['ratio'][domain]:.2f}"]
        seconds = row.get("prune_seconds")  # absent where other work would have been measured
        table.add_row(*cells, "" if seconds is None else f"{seconds:.0f}")
    Console().print(table)


def known_method(text: str) -> str:
    """Argument type: METHOD or METHOD/RECONSTRUCTION."""
    method, slash, reconstruction = text.partition("/")
    if method not in METHODS or (slash and reconstruction not in RECONSTRUCTIONS):
        raise argparse.ArgumentTypeError(
            f"{text!r}: give METHOD or METHOD/RECONSTRUCTION, with a method of "
            f"{', '.join(METHODS)} and a reconstruction of {', '.join(RECONSTRUCTIONS)}"
        )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", type=known_method, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", choices=PATTERNS, default=list(PATTERNS))
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, of each text")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--values", nargs="+", choices=VALUES, default=["bfloat16"], help="of the sparse weights"
    )
    parser.add_argument("--effort", choices=list(EFFORTS), default="default")
    parser.add_argument("--quick", action="store_true", help=f"in place of the above: {QUICK}")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK, effort="low", seeds=options.seeds[:1])
    facts: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "sequence_length": SEQUENCE_LENGTH,
        "windows": options.windows,
        "effort": options.effort,
    }
    try:
        rows = Rows(options.json, facts, KEY)
    except ValueError as error:
        parser.error(str(error))
    wanted = combinations(options.methods, options.patterns, options.seeds, options.values)
    with tempfile.TemporaryDirectory(prefix="permllm-accuracy-") as directory:
        accuracy = Accuracy(Path(directory), options.windows, options.effort)
        if DENSE not in rows:
            rows.add(asdict(accuracy.dense()))
        for combination in wanted:
            if combination not in rows:
                dense = rows[DENSE]["perplexity"]
                rows.add(asdict(accuracy.pruned(*combination, dense)))
                rows.sort(place)
    show(rows.all())


if __name__ == "__main__":
    main()
