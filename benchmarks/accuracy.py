"""Perplexity of every method and pattern on SmolLM2-135M, on text that calibrates none of them.

    python -m benchmarks.accuracy --json OUT
    python -m benchmarks.accuracy --methods wanda+cp permllm-wanda/obs --patterns 4:8 --json OUT
    python -m benchmarks.accuracy --methods permllm-best --values int8 --json OUT
    python -m benchmarks.accuracy --methods permllm-wanda@last:6 permllm-best@no-self-windows \\
        --patterns 2:4 --json OUT
    python -m benchmarks.accuracy --methods wanda+cp wanda+cp@no-smoothing --values int8 --json OUT
    python -m benchmarks.accuracy --methods wanda+cp@converted wanda+cp@converted-without-text \\
        --patterns 2:4 --values int8 int4 --json OUT
    python -m benchmarks.accuracy --checkpoints DIR --json OUT
    python -m benchmarks.accuracy --quick --json OUT

METHOD/RECONSTRUCTION replaces the reconstruction of a method, and @VARIANT behind either changes
its recipe: `last:6` learns the permutations of the last six decoder layers alone, the others are
those of `cp`; `no-self-windows` distils without windows that the dense model writes; and
`no-smoothing` rounds integer values, and what meets them, without evening out inputs. Of integer
values alone, `converted` prunes with the model's own values and has `convert --dataset` round them,
`converted-without-text` without `--dataset`; times are those of the conversion.

Calibrated on State of the Union addresses; evaluated on held-out ones (in domain), on six novels,
and on Python's manual: int8 and int4 values through the kernels that would serve them, which round
activations too, all else by its weights. Rows that depend on a seed beyond the choice of windows
are repeated with every seed. The result is written after each row; what OUT already has is not
measured again, and of a row that lacks a text that text alone. Checkpoints in DIR are used.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from permllm_offline.model.loading import load_served, open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.prepared import prepare
from permllm_offline.preparation.recipe_input import EFFORTS, make_recipe
from permllm_offline.pruning.in_memory import prune_model
from permllm_offline.recipe.methods import METHODS
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from permllm_vllm import ops
from permllm_vllm.checkpoint.pattern import SUPPORTED

from .models import smollm2
from .pruning.checkpoints import (
    KEY,
    SEQUENCE_LENGTH,
    Checkpoints,
    Key,
    Times,
    processor_time,
    times_since,
)
from .pruning.commands import evaluate
from .pruning.named_method import NamedMethod
from .records.result_file import kept_rows
from .texts import sotu, unseen_texts

PATTERNS = ("2:4", "4:8")
"""By default; any of `SUPPORTED` may be given."""
VALUES = ("bfloat16", "int8", "int4")
EVALUATED = {"bfloat16": "weights", "int8": "kernels", "int4": "kernels"}
"""What a row's perplexity is of: of integers not of the weights alone, since the kernels that serve
them round activations."""
DENSE: Key = ("dense", None, None, "bfloat16")
QUICK = {"methods": ["wanda", "wanda+cp", "permllm-best"], "patterns": ["2:4"], "windows": 16}


class Accuracy:
    """Prunes and evaluates.

    Args:
        checkpoints: folder for them, by effort; what it has is not made again.
        windows: evaluation windows of each text.
        effort: of methods that distil.
    """

    def __init__(self, checkpoints: Path, windows: int, effort: str) -> None:
        self._model, self._calibration = smollm2(), sotu().calibration
        length = ("--sequence-length", str(SEQUENCE_LENGTH))
        self._checkpoints = Checkpoints(checkpoints / effort, length, effort)
        self._texts = unseen_texts()
        self._windows, self._effort = windows, effort

    def missing(self, row: Mapping[str, Any]) -> list[str]:
        """Texts that a row, or the empty mapping, has no perplexity of, as it is evaluated now."""
        return [text for text in self._texts if text not in known(row)]

    def completed(
        self, key: Key, row: Mapping[str, Any], dense: Mapping[str, float] | None
    ) -> dict[str, Any]:
        """The row of a key with all texts.

        Args:
            key: values of ``KEY``.
            row: what is known of it, or the empty mapping.
            dense: perplexity of the dense model by text, or None where this is its row.
        """
        found, times = self._measured(key, self.missing(row))
        perplexity = {**known(row), **found}
        ratio = {text: value / (dense or perplexity)[text] for text, value in perplexity.items()}
        return {
            **dict(zip(KEY, key, strict=True)),
            "servable": key == DENSE or servable(key[0]),
            **(asdict(times) if times else {}),
            **row,
            "evaluated": EVALUATED[key[-1]],
            "perplexity": perplexity,
            "ratio": ratio,
        }

    def _measured(self, key: Key, texts: Sequence[str]) -> tuple[dict[str, float], Times | None]:
        if key == DENSE:
            return self._perplexities(self._model, texts), None
        if servable(key[0]):
            checkpoint, times = self._checkpoints.baked(key)
            if EVALUATED[key[-1]] == "weights":
                return self._perplexities(checkpoint, texts), times
            source = open_source(str(checkpoint))
            served = load_served(source, source.dtype, torch.device("cpu"))
            return self._perplexities_in_memory(served, texts), times
        start = time.perf_counter(), processor_time()
        model = self._in_memory(key)
        times = times_since(*start)
        return self._perplexities_in_memory(model, texts), times

    def _in_memory(self, key: Key) -> Any:
        name, pattern, seed, _ = key
        options = {
            "model": str(self._model),
            **NamedMethod.parse(name).entries(),
            "pattern": pattern,
            "seed": seed,
            "dataset": str(self._calibration),
            "sequence_length": SEQUENCE_LENGTH,
        }
        recipe = make_recipe(options, self._effort)
        return prune_model(recipe, prepare(recipe)).model

    def _perplexities(self, checkpoint: Path, texts: Sequence[str]) -> dict[str, float]:
        with tempfile.TemporaryDirectory(prefix="permllm-accuracy-") as directory:
            record = Path(directory) / "eval.json"
            return {
                text: evaluate(checkpoint, self._texts[text], record, windows=self._windows)
                for text in texts
            }

    def _perplexities_in_memory(self, model: Any, texts: Sequence[str]) -> dict[str, float]:
        tokenizer = load_tokenizer(open_source(str(self._model)))
        return {
            text: perplexity(
                model,
                evaluation_windows(
                    str(self._texts[text]), tokenizer, SEQUENCE_LENGTH, self._windows
                ),
            )
            for text in texts
        }


def known(row: Mapping[str, Any]) -> Mapping[str, float]:
    """Perplexities by text that still hold: of integers, not those of the weights alone."""
    if row.get("values") == "int8" and row.get("evaluated") != EVALUATED["int8"]:
        return {}
    return row.get("perplexity", {})


def seeds_of(name: str, seeds: Sequence[int]) -> Sequence[int]:
    """Every seed where something is learned, or tuned in an order that it decides; else one."""
    return seeds if NamedMethod.parse(name).seeded else seeds[:1]


def combinations(
    methods: Sequence[str],
    patterns: Sequence[str],
    seeds: Sequence[int],
    values: Sequence[str],
) -> Iterator[Key]:
    """The key of each row, in the order of the table."""
    for pattern in patterns:
        for name in methods:
            for seed in seeds_of(name, seeds):
                for value_dtype in values:
                    if NamedMethod.parse(name).may_have(value_dtype):
                        yield name, pattern, seed, value_dtype


def servable(name: str) -> bool:
    """Whether a checkpoint can hold the method's permutation."""
    return NamedMethod.parse(name).servable


def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Of a row in the table: dense first, then by pattern, method, values and seed."""
    if row["pattern"] is None:
        return ()
    named = NamedMethod.parse(row["method"])
    order = list(METHODS).index(named.method), named.reconstruction or "", named.variant or ""
    return SUPPORTED.index(row["pattern"]), *order, row["values"], row["seed"]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(
        title="SmolLM2-135M-Instruct: perplexity, and its ratio to the dense model's",
        caption="CP inside blocks, but for -global",
    )
    for column in ("method", "pattern", "seed", "values"):
        table.add_column(column)
    texts = list(dict.fromkeys(text for row in rows for text in row["perplexity"]))
    for column in (*(name for text in texts for name in (text, "x dense")), "prune s"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["method"] if row["servable"] else f"{row['method']} (accuracy only)"]
        cells += [row["pattern"] or "-", "-" if row["seed"] is None else str(row["seed"])]
        cells.append(row["values"])
        for text in texts:
            known = text in row["perplexity"]
            cells.append(f"{row['perplexity'][text]:.1f}" if known else "")
            cells.append(f"{row['ratio'][text]:.2f}" if known else "")
        seconds = row.get("prune_seconds")  # absent where other work would have been measured
        table.add_row(*cells, "" if seconds is None else f"{seconds:.0f}")
    Console().print(table)


def known_method(text: str) -> str:
    """Argument type: the name of a `NamedMethod`."""
    try:
        NamedMethod.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--methods", nargs="+", type=known_method, default=list(METHODS))
    parser.add_argument("--patterns", nargs="+", choices=SUPPORTED, default=list(PATTERNS))
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, of each text")
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], help="of what is learned or tuned"
    )
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep them there")
    parser.add_argument(
        "--values", nargs="+", choices=VALUES, default=["bfloat16"], help="of the sparse weights"
    )
    parser.add_argument("--effort", choices=list(EFFORTS), default="default")
    parser.add_argument("--quick", action="store_true", help=f"in place of the above: {QUICK}")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK, effort="low", seeds=options.seeds[:1])
    if set(options.values) - {"bfloat16"} and ops.missing_reason:
        parser.error(f"such values are evaluated through the kernels: {ops.missing_reason}")
    facts: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct",
        "sequence_length": SEQUENCE_LENGTH,
        "windows": options.windows,
        "effort": options.effort,
    }
    wanted = combinations(options.methods, options.patterns, options.seeds, options.values)
    with (
        kept_rows(parser, options.json, facts, KEY) as rows,
        tempfile.TemporaryDirectory(prefix="permllm-accuracy-") as directory,
    ):
        checkpoints = options.checkpoints or Path(directory)
        accuracy = Accuracy(checkpoints, options.windows, options.effort)
        for key in (DENSE, *wanted):
            row = rows.get(key) or {}
            if accuracy.missing(row):
                dense = None if key == DENSE else rows[DENSE]["perplexity"]
                rows.add(accuracy.completed(key, row, dense))
                rows.sort(place)
        show(rows.all())


if __name__ == "__main__":
    main()
