"""``permllm-offline plan``: what a prune would make of a model, before any work."""

from __future__ import annotations

import argparse
from typing import Any

from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.pattern_options import add_pattern_options
from permllm_offline.commands.plan_tables import outline_table
from permllm_offline.commands.shared_options import add_ignore_option
from permllm_offline.commands.tables import show
from permllm_offline.forecast.outline import outline
from permllm_offline.model.loading import DTYPES, dtype_name, written_dtype
from permllm_offline.model.stored import read_stored
from permllm_offline.pipeline import check_writable
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.target import recipe_for
from permllm_offline.recipe.schema import Recipe

_EXAMPLES = """examples:
  permllm-offline plan ./SmolLM2-135M-Instruct
  permllm-offline plan HuggingFaceTB/SmolLM2-135M-Instruct --values int8 --json plan.json
  permllm-offline plan ./SmolLM2-135M-Instruct --ignore 're:.*\\.down_proj'
"""
VALUES = ("auto", *DTYPES, "int8", "int4")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    default = Recipe.model_fields
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="show what a prune would make of a model: permutations and bytes",
        description="Show what would be pruned, permuted at run time, folded and left dense, and "
        "the bytes before and after. Only config.json and the headers of the safetensors files are "
        "read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the dense model")
    parser.add_argument("--method", default=default["method"].default, help="as for prune")
    add_pattern_options(parser)
    parser.add_argument(
        "--block-size",
        type=int,
        default=default["block_size"].default,
        metavar="N",
        help="channels per permutation block: 32, 64 or 128 (default %(default)s)",
    )
    add_ignore_option(parser)
    parser.add_argument(
        "--values",
        choices=VALUES,
        default="auto",
        help="dtype of the kept weights: auto (the model's own), or as after prune with --dtype or "
        "--values (default %(default)s)",
    )
    add_json_option(parser, "the plan")
    return parser


def run(options: argparse.Namespace) -> None:
    """Show the plan, and write it where asked."""
    check_json(options.json)
    recipe = recipe_for(
        options.target,
        {
            "model": options.model,
            "method": options.method,
            "pattern": options.pattern,
            "block_size": options.block_size,
            "ignore": options.ignore,
            **({"values": options.values} if options.values == "int4" else {}),
        },
    )
    check_writable(recipe)
    permuted = parts_of(recipe).permutation.permutes
    stored = read_stored(options.model)
    values = options.values
    if values == "auto":
        values = dtype_name(written_dtype(stored.source, "auto", "--values"))
    found = outline(
        stored,
        recipe.parsed_pattern(),
        recipe.block_size,
        values,
        permuted=permuted,
        ignore=recipe.ignore,
        dense_dtype=DTYPES.get(options.values),
    )
    show(outline_table(found))
    write_json(options.json, found.to_dict())
