"""``permllm-offline prune``: prune a model and write a checkpoint."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from permllm_offline.api import asked_recipe, prune_and_push
from permllm_offline.commands.moved_options import add_moved_options
from permllm_offline.commands.pattern_options import add_pattern_options
from permllm_offline.commands.shared_options import (
    add_ignore_option,
    add_recipe_numbers,
    add_text_field_option,
)
from permllm_offline.commands.tables import plan_table, report_table, show
from permllm_offline.forecast.announcement import warn_of_slow_float16
from permllm_offline.forecast.duration import forecast
from permllm_offline.model.loading import open_source
from permllm_offline.pipeline import rehearse
from permllm_offline.preparation.recipe_input import EFFORTS
from permllm_offline.recipe.methods import METHODS
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.kinds import RECONSTRUCTIONS
from permllm_offline.report import papers
from permllm_offline.report.serve_command import serve_command
from permllm_offline.run.local_path import local_path
from permllm_offline.run.processes import first, joined
from permllm_offline.text.documents import KINDS, NAMED

_EXAMPLES = """examples:
  permllm-offline prune ./SmolLM2-135M --output ./sparse --dataset calibration.txt
  permllm-offline prune HuggingFaceTB/SmolLM2-135M-Instruct --output ./sparse \\
      --method wanda+cp --pattern 4:8 --dataset Salesforce/wikitext:wikitext-2-raw-v1
  permllm-offline prune ./model --output ./sparse --dataset texts/ --dataset c4 --dry-run
  permllm-offline prune ./other-model --output ./other --recipe ./sparse/recipe.yaml
  permllm-offline prune ./model --output ./sparse --dataset texts/ \\
      --ignore 're:model\\.layers\\.(0|29)\\..*' 're:.*\\.down_proj'
  torchrun --nproc-per-node 2 -m permllm_offline prune ./model --output ./sparse \\
      --dataset texts/ --effort low

What is no option is an entry of the recipe, a YAML file like the recipe.yaml beside a checkpoint:
block_size, sampling, evaluation_windows, smoothing, preset (paper: the constants of arXiv
2510.10136, which take GPU hours), and the constants under learning, blockwise and distillation.

Processes of torchrun share the windows of each step of learning and of distillation, and give what
one process gives with as many; each holds the whole model. Where the recipe gives no
distillation.windows_per_step, each takes one window in a step.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    default = Recipe.model_fields
    methods = "; ".join(f"{name}: {method.summary}" for name, method in METHODS.items())
    parser: argparse.ArgumentParser = commands.add_parser(
        "prune",
        help="prune a model and write a permllm checkpoint",
        description="Prune a model and write a permllm checkpoint that vLLM serves.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or hub name of the dense model")
    parser.add_argument(
        "--output", required=True, type=local_path, metavar="DIR", help="folder to write"
    )
    parser.add_argument(
        "--recipe",
        type=local_path,
        metavar="FILE",
        help="options from a YAML file, such as the recipe.yaml of a checkpoint; those on the "
        "command line come first",
    )
    add_pattern_options(parser)
    parser.add_argument(
        "--method",
        help=f"{methods} (default {default['method'].default})",
    )
    parser.add_argument(
        "--reconstruction",
        metavar="KIND",
        help="in place of the method's own: "
        + "; ".join(f"{name}: {kind.summary}" for name, kind in RECONSTRUCTIONS.items()),
    )
    parser.add_argument(
        "--dataset",
        metavar="FILE|DIR|HUB",
        action="append",
        help=f"calibration text: a {KINDS} file, a folder of them, a hub name, or "
        f"one of {', '.join(NAMED)}, or self: text that the dense model, whole in memory, writes "
        "once, kept in the user's cache; given several times, they share the windows equally",
    )
    add_text_field_option(parser)
    add_recipe_numbers(
        parser,
        {
            "sequence_length": "tokens per window",
            "seed": "of sampling and learning",
        },
    )
    add_ignore_option(parser)
    parser.add_argument(
        "--num-samples",
        type=int,
        metavar="N",
        help=f"calibration windows (default {default['num_samples'].default}; with a method that "
        "distils, what the effort says)",
    )
    parser.add_argument(
        "--effort",
        metavar="|".join(EFFORTS),
        help="how much calibration text and how many steps a method that distils takes, whatever "
        "--recipe says (`default` where neither is given): "
        + "; ".join(
            f"{name}: {entries['num_samples']} windows, {entries['distillation']['steps']} steps"
            for name, entries in EFFORTS.items()
        ),
    )
    parser.add_argument("--device", help=f"torch device (default {default['device'].default})")
    parser.add_argument("--dtype", help="auto (the model's own), bfloat16, float16 or float32")
    parser.add_argument(
        "--values",
        metavar="auto|int8|int4",
        help="the kept weights: auto (the model's dtype), int8 with a scale per row, or int4 with "
        "a multiplier per row and 64 inputs as well",
    )
    parser.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="upload the finished checkpoint to the Hugging Face hub, without the folders that "
        "its recipe names; a new repository is private, and one that holds anything but a permllm "
        "checkpoint is refused (default: nothing is uploaded)",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="remove the finished steps of a run cut off, and begin anew (by default they are gone "
        "on from)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything, the finished steps of a run cut off too, and forecast time, memory "
        "and disk; write no checkpoint. A model of the hub is downloaded; `plan` reads headers "
        "alone",
    )
    parser.add_argument("--force", action="store_true", help="replace a checkpoint in the output")
    add_moved_options(parser)
    return parser


def run(options: argparse.Namespace) -> None:
    """Prune, or with ``--dry-run`` show what would be done."""
    names = set(Recipe.model_fields) & set(vars(options))
    changes = {name: getattr(options, name) for name in names}
    if options.dataset is not None and len(options.dataset) == 1:
        changes["dataset"] = options.dataset[0]
    recipe = asked_recipe(
        changes,
        options.recipe,
        output=options.output,
        target=options.target,
        effort=options.effort,
        push_to_hub=options.push_to_hub,
    )
    if options.dry_run:
        with joined(recipe.device):
            recipe, prepared = rehearse(
                recipe, options.output, force=options.force, restart=options.restart
            )
            if first():
                warn_of_slow_float16(recipe, prepared)
                show(plan_table(recipe, prepared, forecast(recipe, prepared)))
        return
    report, address = prune_and_push(
        recipe,
        options.output,
        push_to_hub=options.push_to_hub,
        force=options.force,
        restart=options.restart,
    )
    if first():
        show(report_table(report))
        print(_what_next(options.output))  # noqa: T201 - folder names are no markup
    if address is not None:
        show(f"uploaded: {address}")


def _what_next(output: Path) -> str:
    """Where the result is, and the commands that a user wants after a prune."""
    folder = shlex.quote(str(output))
    return (
        f"wrote {output}; what happened to each layer: {output / papers.PAGE}\n"
        f"evaluate it: permllm-offline eval {folder} --dataset TEXT\n"
        f"serve it: {serve_command(str(output), open_source(str(output)).config)}\n"
        "(GiB of KV cache on a CPU, and the longest request, which must fit into it)"
    )
