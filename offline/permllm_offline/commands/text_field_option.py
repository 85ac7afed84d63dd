"""The option ``--text-field`` of ``prune``, ``eval`` and ``convert``."""

from __future__ import annotations

import argparse

from permllm_offline.text.row_text import MESSAGES_FIELDS, TEXT_FIELD


def add_text_field_option(parser: argparse._ActionsContainer, default: str | None = None) -> None:
    """Add the option; ``default`` is what it gives where it is left out."""
    parser.add_argument(
        "--text-field",
        default=default,
        metavar="NAME",
        help="field of JSON rows, column of parquet and hub data sets: text, or a list of messages "
        "(role and content, or from and value), which the chat template of the model writes out "
        f"(default {TEXT_FIELD}; {' or '.join(MESSAGES_FIELDS)} where rows have no text)",
    )
