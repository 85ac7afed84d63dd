"""``permllm-offline eval``: perplexity of a dense or permllm checkpoint."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from permllm_offline.errors import OfflineError
from permllm_offline.evaluation import evaluation_windows, perplexity
from permllm_offline.loading import (
    load_model,
    load_tokenizer,
    open_source,
    parse_device,
    parse_dtype,
)

_EXAMPLES = """examples:
  permllm-offline eval ./sparse --dataset held-out.txt
  permllm-offline eval ./model --dataset held-out.txt --sequence-length 2048 --json dense.json
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure the perplexity of a dense or permllm checkpoint",
        description="Measure perplexity over non-overlapping windows.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR", help="folder or hub name")
    parser.add_argument(
        "--dataset", required=True, metavar="FILE|DIR|HUB", help="text to evaluate on"
    )
    parser.add_argument("--sequence-length", type=int, default=512, metavar="N")
    parser.add_argument("--max-windows", type=int, metavar="N", help="default: the whole text")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the result to a file")
    parser.add_argument("--device", default="cpu", help="torch device (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    return parser


def run(options: argparse.Namespace) -> None:
    """Evaluate and report."""
    if options.sequence_length < 2 or (options.max_windows or 1) < 1:
        raise OfflineError("--sequence-length must be at least 2 and --max-windows at least 1.")
    device, source = parse_device(options.device), open_source(options.model)
    dtype = parse_dtype(options.dtype) or source.dtype
    windows = evaluation_windows(
        options.dataset, load_tokenizer(source), options.sequence_length, options.max_windows
    )
    result = {
        "perplexity": perplexity(load_model(source, dtype, device), windows),
        "windows": len(windows),
        "sequence_length": options.sequence_length,
        "dataset": options.dataset,
        "model": options.model,
    }
    text = json.dumps(result, indent=2)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    print(text)  # noqa: T201 - the command's result
