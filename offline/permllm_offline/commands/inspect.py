"""``permllm-offline inspect``: what a permllm checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
from typing import Any

from permllm_offline.commands.json_file import add_json_option, check_json, write_json
from permllm_offline.commands.tables import inspection_table, show
from permllm_offline.inspection.contents import Inspection, inspect
from permllm_offline.inspection.verification import verify
from permllm_offline.run.local_path import local_path

_EXAMPLES = """examples:
  permllm-offline inspect ./sparse
  permllm-offline inspect ./sparse --json sparse.json
  permllm-offline inspect ./sparse --verify
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what a permllm checkpoint holds",
        description="Show each sparse layer: shape, pattern, permutation, bytes, density. With "
        "--verify, read every byte and list every problem; the exit status is 1 if there is one.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directory", type=local_path, metavar="DIR", help="folder of the checkpoint"
    )
    add_json_option(parser, "the table")
    parser.add_argument(
        "--verify", action="store_true", help="verify checksums and every rule of the format"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Show the inspection or the verification, and write it where asked."""
    check_json(options.json)
    found = verify(options.directory) if options.verify else inspect(options.directory)
    problems = False
    if isinstance(found, Inspection):
        show(inspection_table(found))
    else:
        problems = bool(found.problems)
        for line in found.lines():
            print(line)  # noqa: T201 - the command's result
    write_json(options.json, found.to_dict())
    return 1 if problems else 0
