"""The options ``--pattern`` and ``--target`` of ``prune`` and ``plan``."""

from __future__ import annotations

import argparse

from permllm_vllm.checkpoint.pattern import SUPPORTED
from permllm_vllm.diagnosis.target import AUTO, TARGETS


def add_pattern_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument(
        "--pattern",
        help=f"one of {', '.join(SUPPORTED)} (default: that of the target)",
    )
    parser.add_argument(
        "--target",
        metavar="|".join([AUTO, *TARGETS]),
        help="what is to serve the checkpoint, which decides the pattern where --pattern does not: "
        + ", ".join(f"{name} {pattern}" for name, pattern in TARGETS.items())
        + f" (default {AUTO}: what this machine is)",
    )
