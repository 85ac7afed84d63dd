"""``permllm-offline convert``: other sparse checkpoints to this format, this to int8 or dense."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from permllm_offline.commands.conversion_table import conversion_table
from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.shared_options import add_recipe_numbers, add_text_field_option
from permllm_offline.commands.tables import show
from permllm_offline.conversion.to_dense import convert_to_dense
from permllm_offline.conversion.to_sparse import convert_to_sparse
from permllm_offline.errors import OfflineError
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.local_path import local_path
from permllm_offline.text.documents import KINDS, NAMED
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern

logger = logging.getLogger(__name__)

_OF_TEXT = (
    *("text_field", "sampling", "num_samples", "sequence_length", "seed"),
    *("smoothing", "device"),
)
"""Options that say how calibration text is read and used."""

_DESCRIPTION = """Convert a sparse checkpoint of another tool to the permllm format, without pruning
anything again. What the source is comes from its config.json and its zeros: a plain Hugging Face
checkpoint that obeys a pattern (SparseGPT, Wanda, ...), or compressed-tensors' sparse-24-bitmask.
With --masks it is a dense model whose masks were published apart, as MaskLLM's are. With --values
int8 or int4 kept weights are rounded to integers, those of a permllm checkpoint too: by the weights
alone, or with --dataset by what layers read of a text, which is evened out as `prune` does it, so
that less of the model is lost. With --to dense a permllm checkpoint becomes plain, in the original
order of channels, and a model in 8 or 4 bits by compressed-tensors, or in blocks of FP8, one in
16 bits."""

_EXAMPLES = """examples:
  permllm-offline convert ./wanda-2of4 --output ./sparse
  permllm-offline convert neuralmagic/Sparse-Llama-3.1-8B-2of4 --output ./sparse --strict
  permllm-offline convert neuralmagic/Sparse-Llama-3.1-8B-2of4 --output ./sparse-int8 \\
      --values int8 --dataset texts/
  permllm-offline convert meta-llama/Llama-2-7b-hf --masks Vinnnf/LLaMA-2-7B-MaskLLM-C4 \\
      --output ./sparse
  permllm-offline convert ./wanda-4of8 --output ./sparse --pattern 4:8 --json found.json
  permllm-offline convert ./sparse --values int8 --output ./sparse-int8
  permllm-offline convert ./sparse --to dense --output ./dense
  permllm-offline convert ./llama-w4a16 --to dense --output ./dense
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="convert other sparse checkpoints to this format, or this one to int8 or dense",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="SOURCE", help="folder or hub name")
    parser.add_argument(
        "--output", required=True, type=local_path, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--to", choices=("permllm", "dense"), default="permllm", help="(default %(default)s)"
    )
    parser.add_argument(
        "--values",
        choices=("auto", "int8", "int4"),
        default="auto",
        help="kept weights: auto (as they are), int8 with a scale per row, or int4 with a "
        "multiplier per row and 64 inputs as well (default %(default)s)",
    )
    parser.add_argument(
        "--masks",
        metavar="MASKS",
        help="of a dense SOURCE: MaskLLM's npz, its folder, or its name on the hub",
    )
    parser.add_argument(
        "--pattern",
        default="auto",
        choices=("auto", *SUPPORTED),
        help="auto: the strictest that most linears obey",
    )
    _add_text_options(parser)
    parser.add_argument(
        "--strict", action="store_true", help="fail where a linear would have to stay dense"
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in the output")
    parser.add_argument(
        "--max-shard-bytes",
        type=int,
        metavar="N",
        help="per file, which is in memory; by default about a decoder layer, 500 MB or more",
    )
    add_json_option(parser, "the report")
    return parser


def _add_text_options(parser: argparse.ArgumentParser) -> None:
    text = parser.add_argument_group("calibration text, for --values int8 and int4")
    text.add_argument(
        "--dataset",
        metavar="FILE|DIR|HUB",
        action="append",
        help=f"a {KINDS} file, a folder of them, a hub name, or one of {', '.join(NAMED)}; given "
        "several times, they share the windows equally (default: the weights alone decide)",
    )
    add_text_field_option(text)
    text.add_argument("--sampling", help="stream or document, as for `prune`")
    add_recipe_numbers(
        text,
        {
            "num_samples": "windows",
            "sequence_length": "tokens per window",
            "seed": "of sampling",
        },
    )
    text.add_argument(
        "--smoothing",
        action=argparse.BooleanOptionalAction,
        help="even out what the layers read; adapters of the dense model (LoRA) do not fit any "
        "more (default: smoothed)",
    )
    device = Recipe.model_fields["device"].default
    text.add_argument("--device", help=f"torch device that runs the text (default {device})")
    text.add_argument(
        "--restart",
        action="store_true",
        default=None,
        help="remove what a run cut off left of the calibration, and begin anew (by default it is "
        "gone on from)",
    )


def _calibration(options: argparse.Namespace) -> Recipe | None:
    """The recipe of the text that integers are chosen with, or None where there is none."""
    given = [name for name in (*_OF_TEXT, "restart") if getattr(options, name) is not None]
    if options.dataset is None:
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            logger.warning("no text is read without --dataset: %s is of no use", names)
        return None
    entries = {name: getattr(options, name) for name in (*_OF_TEXT, "values")}
    # Of the method nothing is used; this one needs no text.
    fixed = {"model": options.model, "method": "magnitude", "dataset": tuple(options.dataset)}
    return make_recipe(entries | fixed)


def run(options: argparse.Namespace) -> None:
    """Convert and show what was found."""
    check_json(options.json)
    if options.max_shard_bytes is not None and options.max_shard_bytes < 1:
        raise OfflineError(f"--max-shard-bytes {options.max_shard_bytes}: give at least 1.")
    writing = {"force": options.force, "max_shard_bytes": options.max_shard_bytes}
    calibration = _calibration(options)
    if options.to == "dense":
        if options.values != "auto" or calibration is not None:
            given = "--dataset" if options.values == "auto" else f"--values {options.values}"
            raise OfflineError(
                f"{given} is about the sparse checkpoint that is written, and a dense one has the "
                "model's dtype: leave it out with --to dense."
            )
        if options.strict or options.masks or options.pattern != "auto":
            raise OfflineError(
                "--pattern, --strict and --masks are about what is found in a source: leave them "
                "out with --to dense."
            )
        report = convert_to_dense(options.model, options.output, **writing)
    else:
        report = convert_to_sparse(
            options.model,
            options.output,
            pattern=None if options.pattern == "auto" else Pattern.parse(options.pattern),
            strict=options.strict,
            values=options.values,
            calibration=calibration,
            masks=options.masks,
            restart=bool(options.restart),
            **writing,
        )
    show(conversion_table(report))
    write_json(options.json, report.to_dict())
