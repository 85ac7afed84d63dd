"""The command ``permllm-offline``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from permllm_offline.commands import convert as convert_command
from permllm_offline.commands import doctor as doctor_command
from permllm_offline.commands import eval as eval_command
from permllm_offline.commands import inspect as inspect_command
from permllm_offline.commands import plan as plan_command
from permllm_offline.commands import prune as prune_command
from permllm_offline.errors import OfflineError
from permllm_vllm import __version__
from permllm_vllm.checkpoint.errors import CheckpointError

BAD_INPUT = 2


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the command with its sub-commands."""
    parser = argparse.ArgumentParser(
        prog="permllm-offline",
        description="Prune a language model to N:M sparsity with learned channel permutations.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (
        doctor_command,
        plan_command,
        prune_command,
        eval_command,
        inspect_command,
        convert_command,
    ):
        sub = command.add_parser(commands)
        sub.add_argument(
            "-v", "--verbose", action="store_true", help="more log, and tracebacks of errors"
        )
        sub.set_defaults(run=command.run, refuse=sub.error)
    return parser


def _is_utf8(word: str) -> bool:
    try:
        word.encode()
    except UnicodeEncodeError:
        return False
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for bad input, 1 for a bad finding)."""
    parser = build_parser()
    for word in sys.argv[1:] if arguments is None else arguments:
        if not _is_utf8(word):  # what is written down of a run is
            parser.error(f"{word!r} is not UTF-8: rename the file, or link to it by another name")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # with the usage of the sub-command, which argparse itself does not show
        options.refuse(
            f"unrecognized arguments: {' '.join(unknown)} (a name with spaces wants quotes)"
        )
    logging.basicConfig(
        level=logging.INFO if options.verbose else logging.WARNING,
        format="%(levelname)s %(name)s: %(message)s",
    )
    try:
        return options.run(options) or 0
    except (OfflineError, CheckpointError, OSError) as error:
        if options.verbose:
            logging.getLogger(__name__).exception("failed")
        sys.stderr.write(f"permllm-offline {options.command}: error: {error}\n")
        return BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write(f"permllm-offline {options.command}: interrupted\n")
        return 130
