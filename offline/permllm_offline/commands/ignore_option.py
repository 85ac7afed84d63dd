"""The option ``--ignore`` of ``prune`` and ``plan``."""

from __future__ import annotations

import argparse


def add_ignore_option(parser: argparse.ArgumentParser) -> None:
    """Add the option; it may be given several times."""
    parser.add_argument(
        "--ignore",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="linear layers that stay dense, beside the output head and the embeddings: names in "
        "full, as the model has them, or re: and a regular expression that matches whole names; of "
        "those that read the same tensor (q, k and v; gate and up) all or none",
    )
