"""``permllm-offline inspect``: what a permllm checkpoint holds, and whether it is whole."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from permllm_offline.commands.tables import inspection_table, show
from permllm_offline.inspection import Inspection, inspect
from permllm_offline.verification import verify

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
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table to a file")
    parser.add_argument(
        "--verify", action="store_true", help="verify checksums and every rule of the format"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Show the inspection or the verification, and write it where asked."""
    found = verify(options.directory) if options.verify else inspect(options.directory)
    if options.json is not None:
        options.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    if isinstance(found, Inspection):
        show(inspection_table(found))
        return 0
    for line in found.lines():
        print(line)  # noqa: T201 - the command's result
    return 1 if found.problems else 0
