"""``permllm-offline plan``: what a prune would make of a model, before any work."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

from permllm_offline.commands.ignore_option import add_ignore_option
from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.plan_tables import outline_table, speed_table
from permllm_offline.commands.tables import show
from permllm_offline.forecast.outline import outline
from permllm_offline.forecast.speedup import Speed, expected_speed
from permllm_offline.model.loading import DTYPES, dtype_name, written_dtype
from permllm_offline.model.stored import read_stored
from permllm_offline.pipeline import check_writable
from permllm_offline.preparation.method_parts import parts_of
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.local_path import local_path
from permllm_vllm.checkpoint.pattern import SUPPORTED

_EXAMPLES = """examples:
  permllm-offline plan ./SmolLM2-135M-Instruct
  permllm-offline plan HuggingFaceTB/SmolLM2-135M-Instruct --values int8 --json plan.json
  permllm-offline plan ./SmolLM2-135M-Instruct --ignore 're:.*\\.down_proj'
"""
VALUES = ("auto", *DTYPES, "int8", "int4")
MEASURED_VALUES = ("bfloat16", "int8", "int4")
"""Values that the kernels are measured with."""
OF_FLOAT16 = (
    "that of bfloat16, to which the CPU kernels round float16 values; for activations as fast, "
    "vllm serve --dtype bfloat16"
)
OF_INT8 = "that of int8: int4 was not measured on this kind of CPU"


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
    add_ignore_option(parser)
    parser.add_argument(
        "--values",
        choices=VALUES,
        default="auto",
        help="dtype of the kept weights: auto (the model's own), or as after prune with --dtype or "
        "--values (default %(default)s)",
    )
    parser.add_argument(
        "--measured",
        type=local_path,
        metavar="FILE",
        help="forecast from this result of `python -m benchmarks.kernels --device cpu --json FILE` "
        "(default: the packaged one for this CPU)",
    )
    add_json_option(parser, "the plan")
    return parser


def run(options: argparse.Namespace) -> None:
    """Show the plan, and write it where asked."""
    check_json(options.json)
    recipe = make_recipe(
        {
            "model": options.model,
            "method": options.method,
            "pattern": options.pattern,
            "block_size": options.block_size,
            "ignore": options.ignore,
            **({"values": options.values} if options.values == "int4" else {}),
        }
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
    served = "bfloat16" if values == "float16" else values
    if served in MEASURED_VALUES or options.measured is not None:
        speed = expected_speed(found.shapes, found.pattern, served, options.measured)
        speed = replace(speed, note="" if served == values else OF_FLOAT16)
        if values == "int4" and not speed.shapes:
            speed = expected_speed(found.shapes, found.pattern, "int8", options.measured)
            speed = replace(speed, note=OF_INT8)
    else:
        speed = Speed("", [], reason=f"not measured for {values} values")
    show(outline_table(found), speed_table(speed, found.pattern))
    write_json(options.json, found.to_dict() | {"speed": speed.to_dict()})
