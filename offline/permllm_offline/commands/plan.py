"""``permllm-offline plan``: what a prune would make of a model, before any work."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from permllm_offline.commands.outline_tables import outline_table, speed_table
from permllm_offline.commands.tables import show
from permllm_offline.model.stored import read_stored
from permllm_offline.outline import outline
from permllm_offline.permutation.kinds import PERMUTATIONS
from permllm_offline.pipeline import check_writable
from permllm_offline.recipe import Recipe, make_recipe
from permllm_offline.speed import expected_speed
from permllm_vllm.checkpoint.pattern import SUPPORTED

_EXAMPLES = """examples:
  permllm-offline plan ./SmolLM2-135M-Instruct
  permllm-offline plan HuggingFaceTB/SmolLM2-135M-Instruct --values int8 --json plan.json
"""
VALUES = ("bfloat16", "int8")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    default = Recipe.model_fields
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="show what a prune would make of a model: permutations, bytes, speed",
        description="Show what would be pruned, permuted at run time, folded and left dense, the "
        "bytes before and after, and the speed to expect on this machine. Only config.json and the "
        "headers of the safetensors files are read.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the dense model")
    parser.add_argument("--method", default=default["method"].default, help="as for prune")
    parser.add_argument(
        "--pattern",
        default=default["pattern"].default,
        help=f"one of {', '.join(SUPPORTED)} (default %(default)s)",
    )
    parser.add_argument(
        "--block-size",
        type=int,
        default=default["block_size"].default,
        metavar="N",
        help="channels per permutation block: 32, 64 or 128 (default %(default)s)",
    )
    parser.add_argument(
        "--values",
        choices=VALUES,
        default="bfloat16",
        help="dtype of the kept weights (default %(default)s)",
    )
    parser.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="forecast from this result of `python -m benchmarks.kernels --device cpu --json FILE` "
        "(default: the packaged one for this CPU)",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the plan to a file")
    return parser


def run(options: argparse.Namespace) -> None:
    """Show the plan, and write it where asked."""
    recipe = make_recipe(
        {
            "model": options.model,
            "method": options.method,
            "pattern": options.pattern,
            "block_size": options.block_size,
        }
    )
    check_writable(recipe)
    permuted = PERMUTATIONS[recipe.parsed_method().permutation].permutes
    found = outline(
        read_stored(options.model),
        recipe.parsed_pattern(),
        recipe.block_size,
        options.values,
        permuted=permuted,
    )
    speed = expected_speed(found.shapes, options.values, options.measured)
    if options.json is not None:
        record = found.to_dict() | {"speed": speed.to_dict()}
        options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    show(outline_table(found), speed_table(speed))
