"""``permllm-offline inspect``: what a permllm checkpoint holds, layer by layer."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from permllm_offline.commands.tables import inspection_table, show
from permllm_offline.inspection import inspect

_EXAMPLES = """examples:
  permllm-offline inspect ./sparse
  permllm-offline inspect ./sparse --json sparse.json
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the sub-command and its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="show what a permllm checkpoint holds",
        description="Show each sparse layer: shape, pattern, permutation, bytes, density.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="folder of the checkpoint")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the table to a file")
    return parser


def run(options: argparse.Namespace) -> None:
    """Show the inspection, and write it where asked."""
    found = inspect(options.directory)
    if options.json is not None:
        options.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n", encoding="utf-8")
    show(inspection_table(found))
