"""Perplexity of SmolLM2-135M in dense int8 and int4, on the texts of `benchmarks.accuracy`.

    python -m venv COMPRESSOR && COMPRESSOR/bin/pip install llmcompressor==0.14.0.1
    python -m benchmarks.dense_quantization --compressor COMPRESSOR/bin/python --json OUT

llm-compressor quantizes by GPTQ, in an environment of its own: its requirements and those of vLLM
do not meet. It calibrates on windows that `permllm-offline prune` draws from the same text. int8 is
vLLM's W8A8, a scale per output channel and, for the inputs, per token; int4 has a scale per group
of input channels. All are evaluated in float32, as compressed-tensors computes them, inputs rounded
too. The result is written after each row; what OUT already has is not measured again.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.dense_quantization.compressor import Compressor
from benchmarks.dense_quantization.values import DENSE, KEY, KEYS, name_of
from benchmarks.models import SMOLLM2, smollm2
from benchmarks.pruning.checkpoints import SEQUENCE_LENGTH
from benchmarks.records.result_file import kept_rows
from benchmarks.texts import sotu, unseen_texts
from permllm_offline.model.loading import open_source
from permllm_offline.model.tokenizer import load_tokenizer
from permllm_offline.text.evaluation import evaluation_windows, perplexity
from permllm_offline.text.windows import sample_windows

SEED = 0


class Evaluation:
    """Evaluates a model on every text.

    Args:
        texts: name -> file.
        tokenizer: of the dense model; a quantized one has the same.
        windows: of each text.
    """

    def __init__(self, texts: Mapping[str, Path], tokenizer: Any, windows: int) -> None:
        self._windows = {
            text: evaluation_windows(str(file), tokenizer, SEQUENCE_LENGTH, windows)
            for text, file in texts.items()
        }

    def perplexities(self, checkpoint: Path) -> dict[str, float]:
        """By text; a quantized checkpoint is decompressed, and its inputs are rounded as served.

        In float32: in bfloat16 compressed-tensors rounds scales too, and inputs with these, which
        vLLM does not.
        """
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        return {text: perplexity(model, found, text) for text, found in self._windows.items()}


def calibration_windows(tokenizer: Any, count: int) -> torch.Tensor:
    """Those that a prune with seed 0 draws: int64 [count, 512]."""
    return sample_windows(
        [str(sotu().calibration)],
        tokenizer,
        num_samples=count,
        sequence_length=SEQUENCE_LENGTH,
        seed=SEED,
    ).calibration


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table(title=f"{SMOLLM2.name}: perplexity, and its ratio to the dense model's")
    table.add_column("values")
    for text in rows[0]["perplexity"]:
        table.add_column(text, justify="right")
        table.add_column("x dense", justify="right")
    for row in rows:
        pairs = ((row["perplexity"][text], row["ratio"][text]) for text in row["perplexity"])
        cells = [cell for p, ratio in pairs for cell in (f"{p:.1f}", f"{ratio:.2f}")]
        table.add_row(name_of(row), *cells)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compressor", type=Path, required=True, metavar="PYTHON", help="that has llm-compressor"
    )
    parser.add_argument("--windows", type=int, default=64, help="of 512 tokens, of each text")
    parser.add_argument("--calibration-windows", type=int, default=128, help="of 512 tokens")
    parser.add_argument("--json", type=Path, required=True, help="where the result is written")
    options = parser.parse_args()
    try:
        compressor = Compressor(options.compressor)
    except ValueError as error:
        parser.error(str(error))
    facts = {
        "model": SMOLLM2.name,
        "sequence_length": SEQUENCE_LENGTH,
        "dtype": "float32",
        "windows": options.windows,
        "calibration_windows": options.calibration_windows,
        "llmcompressor": compressor.version,
    }
    with (
        kept_rows(parser, options.json, facts, KEY) as rows,
        tempfile.TemporaryDirectory(prefix="permllm-quantized-") as directory,
    ):
        model, calibration = smollm2(), Path(directory) / "windows.pt"
        tokenizer = load_tokenizer(open_source(str(model)))
        torch.save(calibration_windows(tokenizer, options.calibration_windows), calibration)
        evaluation = Evaluation(unseen_texts(), tokenizer, options.windows)
        for key in KEYS:
            if key in rows:
                continue
            checkpoint = model
            if key != DENSE:
                checkpoint = Path(directory) / "-".join(map(str, key))
                compressor.compress(model, checkpoint, key, calibration)
            found = evaluation.perplexities(checkpoint)
            dense = found if key == DENSE else rows[DENSE]["perplexity"]
            ratio = {text: value / dense[text] for text, value in found.items()}
            rows.add({**dict(zip(KEY, key, strict=True)), "perplexity": found, "ratio": ratio})
        show(rows.all())


if __name__ == "__main__":
    main()
