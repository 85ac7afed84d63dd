"""What pruning costs in quality: patterns x efforts x values, beside dense int8, int4 and int3.

    python -m venv COMPRESSOR && COMPRESSOR/bin/pip install llmcompressor==0.14.0.1
    python -m benchmarks.efforts --compressor COMPRESSOR/bin/python --json OUT
    python -m benchmarks.efforts --model gemma3 --efforts low --values int8 --json OUT
    python -m benchmarks.efforts --methods wanda wanda+cp --efforts default --json OUT
    python -m benchmarks.figures    # quality lost against bits a weight, of the records in it

Every model is calibrated on State of the Union addresses, and evaluated on held-out ones (in
domain), on six novels and on Python's manual: perplexity, and its ratio to the dense model's.
Sparse models are evaluated as served, by the kernels, which round activations beside integers.
Dense int8 (W8A8, a scale per output channel), int4 and int3 (a scale per 64 inputs) are chosen by
GPTQ of llm-compressor, which needs an environment of its own, and evaluated in float32, as
compressed-tensors computes them, inputs of int8 rounded too; without --compressor they are left
out.

`bits_per_weight` counts values, masks and scales, as a checkpoint stores them. The result is
written after each row; what OUT already has is not measured again. Checkpoints in DIR are used.
"""

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from permllm_offline.inspection.contents import inspect
from permllm_offline.model.loading import load_served, open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.preparation.recipe_input import EFFORTS
from permllm_offline.recipe.methods import METHODS
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from permllm_offline.text.windows import sample_windows
from permllm_vllm import ops
from permllm_vllm.checkpoint.pattern import SUPPORTED

from .models import REAL
from .pruning.checkpoints import SEQUENCE_LENGTH, Checkpoints, Sparse
from .pruning.compressor import Compressor
from .quality import DEFAULT_METHOD, DENSE, dense_bits, qualities
from .records.result_file import kept_rows
from .records.rows import Rows
from .texts import sotu, unseen_texts

KEY = ("method", "pattern", "effort", "values", "seed")
PATTERNS = ("2:4", "8:16", "32:64")
VALUES = ("bfloat16", "int8", "int4")
DENSE_BITS = {"int8": 8, "int4": 4, "int3": 3}
"""Of the dense peers: what llm-compressor is asked for."""
CALIBRATION_WINDOWS = 128
"""That dense peers are quantized on; they are those that a prune with seed 0 draws."""

Key = tuple[str, str | None, str | None, str, int | None]


class Evaluation:
    """Perplexities of a model on every text.

    Args:
        model: the dense one, whose tokenizer all have.
        windows: of each text.
    """

    def __init__(self, model: Path, windows: int) -> None:
        self.tokenizer = load_tokenizer(open_source(str(model)))
        self._windows = {
            text: evaluation_windows(str(file), self.tokenizer, SEQUENCE_LENGTH, windows)
            for text, file in unseen_texts().items()
        }

    def served(self, checkpoint: Path) -> dict[str, float]:
        """Of a dense model, or of a sparse one as the kernels compute it."""
        source = open_source(str(checkpoint))
        return self._perplexities(load_served(source, source.dtype, torch.device("cpu")))

    def quantized(self, checkpoint: Path) -> dict[str, float]:
        """Of what llm-compressor wrote, decompressed, and its inputs rounded as served.

        In float32: in bfloat16 compressed-tensors rounds scales too, and inputs with these, which
        vLLM does not.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        return self._perplexities(model.eval())

    def _perplexities(self, model: Any) -> dict[str, float]:
        return {text: perplexity(model, found, text) for text, found in self._windows.items()}


class Qualities:
    """Makes and evaluates the model of each row.

    Args:
        model: the dense one.
        directory: for checkpoints; what it has is not made again.
        windows: evaluation windows of each text.
        compressor: for dense peers, or None.
    """

    def __init__(
        self, model: Path, directory: Path, windows: int, compressor: Compressor | None
    ) -> None:
        self._model, self._directory, self._compressor = model, directory, compressor
        length = ("--sequence-length", str(SEQUENCE_LENGTH))
        self._checkpoints = Checkpoints(directory, model, length)
        self._evaluation = Evaluation(model, windows)

    def measured(self, key: Key) -> dict[str, Any]:
        """What is measured for a row: bits a weight, perplexities, and what a prune took."""
        method, _, _, values, _ = key
        if method == DENSE:
            bits = {"bits_per_weight": dense_bits(values)}
            if values == "bfloat16":
                return {**bits, "perplexity": self._evaluation.served(self._model)}
            return {**bits, "perplexity": self._evaluation.quantized(self._compressed(values))}
        checkpoint, times = self._checkpoints.baked(Sparse(*key))  # type: ignore[arg-type]
        found = inspect(checkpoint)
        return {
            "bits_per_weight": round(16 * found.bytes / found.dense_bytes, 3),
            **(asdict(times) if times else {}),
            "perplexity": self._evaluation.served(checkpoint),
        }

    def _compressed(self, values: str) -> Path:
        assert self._compressor is not None
        output = self._directory / f"dense-{values}"
        if not (output / "config.json").exists():
            with tempfile.TemporaryDirectory(prefix="permllm-efforts-") as directory:
                windows = Path(directory) / "windows.pt"
                torch.save(self._calibration(), windows)
                self._compressor.compress(self._model, output, DENSE_BITS[values], windows)
        return output

    def _calibration(self) -> torch.Tensor:
        """Windows that a prune with seed 0 draws: int64 [windows, 512]."""
        return sample_windows(
            [str(sotu().calibration)],
            self._evaluation.tokenizer,
            num_samples=CALIBRATION_WINDOWS,
            sequence_length=SEQUENCE_LENGTH,
            seed=0,
        ).calibration


def keys(options: argparse.Namespace) -> Iterator[Key]:
    """The key of each row, in the order of the table."""
    peers = DENSE_BITS if options.compressor else ()
    yield from ((DENSE, None, None, values, None) for values in ("bfloat16", *peers))
    for pattern in options.patterns:
        for method in options.methods:
            for effort in options.efforts:
                for values in options.values:
                    for seed in options.seeds:
                        yield method, pattern, effort, values, seed


def fill(rows: Rows, wanted: Sequence[Key], qualities: Qualities) -> None:
    """Measure the rows that the result lacks; the dense model's comes first."""
    for key in wanted:
        if key not in rows:
            found = qualities.measured(key)
            perplexities = found["perplexity"]
            dense = perplexities if key == wanted[0] else rows[wanted[0]]["perplexity"]
            ratio = {text: value / dense[text] for text, value in perplexities.items()}
            rows.add({**dict(zip(KEY, key, strict=True)), **found, "ratio": ratio})


def show(result: Mapping[str, Any]) -> None:
    """Print a line for each model: the mean over its seeds."""
    table = Table(title=f"{result['model']}: perplexity, times the dense model's")
    lines = list(qualities(result))
    for column in ("model", "bits a weight", *lines[0].ratios, "processor minutes"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for line in lines:
        table.add_row(*line.cells())
    Console().print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(REAL), default="smollm2")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=[DEFAULT_METHOD])
    parser.add_argument("--patterns", nargs="+", choices=SUPPORTED, default=list(PATTERNS))
    parser.add_argument("--efforts", nargs="+", choices=list(EFFORTS), default=list(EFFORTS))
    parser.add_argument("--values", nargs="+", choices=VALUES, default=list(VALUES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument(
        "--compressor", type=Path, metavar="PYTHON", help="that has llm-compressor: dense peers"
    )
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, of each text")
    parser.add_argument("--checkpoints", type=Path, metavar="DIR", help="keep them there")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    return parser


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    if ops.missing_reason:
        parser.error(f"sparse models are evaluated through the kernels: {ops.missing_reason}")
    try:
        compressor = Compressor(options.compressor) if options.compressor else None
    except ValueError as error:
        parser.error(str(error))
    model = REAL[options.model]()
    facts = {
        "model": model.name,
        "sequence_length": SEQUENCE_LENGTH,
        "windows": options.windows,
        "calibration_windows": CALIBRATION_WINDOWS,
    }
    with (
        kept_rows(parser, options.json, facts, KEY) as rows,
        tempfile.TemporaryDirectory(prefix="permllm-efforts-") as directory,
    ):
        checkpoints = options.checkpoints or Path(directory)
        made = Qualities(model, checkpoints / model.name, options.windows, compressor)
        fill(rows, list(keys(options)), made)
        show({**facts, "rows": rows.all()})


if __name__ == "__main__":
    main()
