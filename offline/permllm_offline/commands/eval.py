"""``permllm-offline eval``: perplexity and tasks of a dense or permllm checkpoint."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from permllm_offline.api import evaluate
from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.shared_options import add_text_field_option
from permllm_offline.run.local_path import local_path
from permllm_offline.text.documents import KINDS, NAMED
from permllm_offline.text.paper_protocol import LENGTHS, PAPER_TEXTS
from permllm_offline.text.row_text import TEXT_FIELD

_EXAMPLES = """examples:
  permllm-offline eval ./sparse --dataset held-out.txt
  permllm-offline eval ./model --dataset held-out.txt --sequence-length 2048 --json dense.json
  permllm-offline eval ./sparse --dataset wikitext2 --protocol paper
  permllm-offline eval ./sparse --dataset c4 --max-windows 200
  permllm-offline eval ./sparse --tasks hellaswag,arc_easy,arc_challenge,openbookqa,rte
  permllm-offline eval ./sparse --tasks my_task --tasks-path ./tasks --few-shot 5 --limit 200
"""


class _OneText(argparse.Action):
    """Refuses a second ``--dataset``, which would take the place of the first without a word."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Store the value."""
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{option_string} is given twice: measure one text, then the other")
        setattr(namespace, self.dest, values)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help="measure perplexity and tasks of a dense or permllm checkpoint",
        description="Measure perplexity over non-overlapping windows, and tasks through lm-eval. "
        "Perplexity is that of the weights, which are held dense in memory; tasks are answered by "
        "the kernels that would serve a permllm checkpoint on this device and in this dtype.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="DIR", help="folder or hub name")
    parser.add_argument(
        "--dataset",
        action=_OneText,
        metavar="FILE|DIR|HUB",
        help=f"text to measure perplexity on (one): a {KINDS} file, a "
        f"folder of them, a hub name, or {', '.join(NAMED)}, the test text of each",
    )
    add_text_field_option(parser, TEXT_FIELD)
    parser.add_argument(
        "--protocol",
        default="rows",
        metavar="|".join(LENGTHS),
        help="rows: each row of the text is tokenized alone; paper: as the tables of GPTQ, "
        f"SparseGPT and Wanda read {' and '.join(PAPER_TEXTS)}, the rows of the test text joined, "
        "tokenized once (default %(default)s)",
    )
    lengths = f"{LENGTHS['rows']}; with --protocol paper {LENGTHS['paper']}"
    parser.add_argument(
        "--sequence-length",
        type=int,
        metavar="N",
        help=f"tokens in a window of the perplexity (default {lengths})",
    )
    parser.add_argument(
        "--max-windows",
        type=int,
        metavar="N",
        help="measure the first N windows, where all would take too long: of c4 they are 15,625 of "
        "512 tokens (default: the text, up to 8 million tokens)",
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks of lm-eval, separated by commas")
    parser.add_argument(
        "--tasks-path",
        type=local_path,
        metavar="DIR",
        help="folder of more tasks (YAML of lm-eval)",
    )
    parser.add_argument("--few-shot", type=int, metavar="N", help="default: what each task says")
    parser.add_argument("--limit", type=int, metavar="N", help="questions per task; default: all")
    parser.add_argument(
        "--batch-size", type=int, default=8, metavar="N", help="of the tasks (default %(default)s)"
    )
    add_json_option(parser, "the result")
    parser.add_argument("--device", help="torch device (default cpu)")
    parser.add_argument("--dtype", default="auto", help="auto, bfloat16, float16 or float32")
    return parser


def run(options: argparse.Namespace) -> None:
    """Evaluate and report."""
    check_json(options.json)
    found = evaluate(
        options.model,
        options.dataset,
        text_field=options.text_field,
        protocol=options.protocol,
        sequence_length=options.sequence_length,
        max_windows=options.max_windows,
        tasks=options.tasks,
        tasks_path=options.tasks_path,
        few_shot=options.few_shot,
        limit=options.limit,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
    )
    result: dict[str, Any] = {"model": options.model}
    if options.dataset is not None:
        result |= {
            # Beyond the range of a float it is infinite, which JSON has not.
            "perplexity": found.perplexity if math.isfinite(found.perplexity or 0) else None,
            "windows": found.windows,
            "sequence_length": found.sequence_length,
            "dataset": options.dataset,
            "protocol": found.protocol,
        }
    if options.tasks is not None:
        result["tasks"] = found.tasks
    print(json.dumps(result, indent=2, allow_nan=False))  # noqa: T201 - the command's result
    write_json(options.json, result)
