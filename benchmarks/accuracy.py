"""Perplexity of every method and pattern on SmolLM2-135M, on text that no calibration saw.

    python -m benchmarks.accuracy --json OUT
    python -m benchmarks.accuracy --methods wanda+cp permllm-wanda/obs --patterns 4:8 --json OUT
    python -m benchmarks.accuracy --quick --json OUT

METHOD/RECONSTRUCTION replaces the reconstruction of a method. Calibrated on State of the Union
addresses; evaluated on held-out ones (in domain) and on six novels (another domain). Rows that
depend on a seed beyond the choice of windows are repeated with every seed. The result is written
after each row.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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

from .machine import write_json
from .models import smollm2
from .offline import evaluate, permllm_offline
from .texts import austen, sotu

PATTERNS = ("2:4", "4:8")
SEQUENCE_LENGTH = 512
QUICK = {"methods": ["wanda", "wanda+cp", "permllm-best"], "patterns": ["2:4"], "windows": 16}


@dataclass(frozen=True)
class Row:
    """One pruned model; ``servable`` is false where no checkpoint can hold the permutation."""

    method: str
    pattern: str | None
    seed: int | None
    perplexity: Mapping[str, float]
    ratio: Mapping[str, float]
    prune_seconds: float
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
        self._dense = self._perplexities(self._model)

    def dense(self) -> Row:
        """The model before pruning."""
        return self._row("dense", None, None, self._dense, 0.0)

    def pruned(self, name: str, pattern: str, seed: int) -> Row:
        """One row; ``name`` is METHOD or METHOD/RECONSTRUCTION."""
        method, _, reconstruction = name.partition("/")
        start = time.perf_counter()
        if PERMUTATIONS[METHODS[method].permutation].across_blocks:
            recipe = make_recipe(
                {
                    "model": str(self._model),
                    "method": method,
                    "reconstruction": reconstruction or None,
                    "pattern": pattern,
                    "seed": seed,
                    "dataset": str(self._calibration),
                    "sequence_length": SEQUENCE_LENGTH,
                },
                self._effort,
            )
            return self._in_memory(name, recipe, start)
        checkpoint = self._directory / "checkpoint"
        permllm_offline(
            *("prune", self._model, "--output", checkpoint, "--force"),
            *("--method", method, "--pattern", pattern, "--seed", str(seed)),
            *(("--reconstruction", reconstruction) if reconstruction else ()),
            *("--dataset", self._calibration, "--effort", self._effort),
            *("--sequence-length", str(SEQUENCE_LENGTH)),
        )
        seconds = time.perf_counter() - start
        return self._row(name, pattern, seed, self._perplexities(checkpoint), seconds)

    def _in_memory(self, name: str, recipe: Recipe, start: float) -> Row:
        model = prune_model(recipe, prepare(recipe)).model
        seconds = time.perf_counter() - start
        tokenizer = load_tokenizer(open_source(recipe.model))
        found = {}
        for domain, text in self._texts.items():
            windows = evaluation_windows(str(text), tokenizer, SEQUENCE_LENGTH, self._windows)
            found[domain] = perplexity(model, windows)
        return self._row(name, recipe.pattern, recipe.seed, found, seconds, servable=False)

    def _perplexities(self, checkpoint: Path) -> dict[str, float]:
        record = self._directory / "eval.json"
        return {
            domain: evaluate(checkpoint, text, record, windows=self._windows)
            for domain, text in self._texts.items()
        }

    def _row(
        self,
        name: str,
        pattern: str | None,
        seed: int | None,
        found: Mapping[str, float],
        seconds: float,
        *,
        servable: bool = True,
    ) -> Row:
        ratio = {domain: value / self._dense[domain] for domain, value in found.items()}
        return Row(name, pattern, seed, found, ratio, round(seconds, 1), servable)


def seeds_of(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """Every seed where something is learned, else the first."""
    method, _, reconstruction = name.partition("/")
    parts = METHODS[method]
    kind = RECONSTRUCTIONS[reconstruction or parts.reconstruction]
    learned = PERMUTATIONS[parts.permutation].learn is not None or kind.model is not None
    return seeds if learned else seeds[:1]


def combinations(
    methods: Sequence[str], patterns: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, str, int]]:
    """Name, pattern and seed of each row, in the order of the table."""
    for pattern in patterns:
        for name in methods:
            for seed in seeds_of(name, seeds):
                yield name, pattern, seed


def show(rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title="SmolLM2-135M-Instruct: perplexity, and its ratio to the dense model's")
    for column in ("method", "pattern", "seed"):
        table.add_column(column)
    for column in ("in domain", "x dense", "novels", "x dense", "prune s"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row.method if row.servable else f"{row.method} (accuracy only)"]
        cells += [row.pattern or "-", "-" if row.seed is None else str(row.seed)]
        for domain, value in row.perplexity.items():
            cells += [f"{value:.1f}", f"{row.ratio[domain]:.2f}"]
        table.add_row(*cells, f"{row.prune_seconds:.0f}")
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
    with tempfile.TemporaryDirectory(prefix="permllm-accuracy-") as directory:
        accuracy = Accuracy(Path(directory), options.windows, options.effort)
        rows = [accuracy.dense()]
        for name, pattern, seed in combinations(options.methods, options.patterns, options.seeds):
            rows.append(accuracy.pruned(name, pattern, seed))
            write_json(options.json, facts | {"rows": [asdict(row) for row in rows]})
    show(rows)


if __name__ == "__main__":
    main()
