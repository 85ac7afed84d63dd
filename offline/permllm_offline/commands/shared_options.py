"""Options that several sub-commands have."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from permllm_offline.recipe.schema import Recipe
from permllm_offline.text.row_text import MESSAGES_FIELDS, TEXT_FIELD


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


def add_recipe_numbers(parser: argparse._ActionsContainer, helps: Mapping[str, str]) -> None:
    """Add an option for each entry, by name; the recipe's default stands behind its help."""
    for name, text in helps.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{text} (default {Recipe.model_fields[name].default})",
        )
