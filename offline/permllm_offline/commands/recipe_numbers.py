"""Options of whole numbers that are entries of a recipe, for ``prune`` and ``convert``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

from permllm_offline.recipe.schema import Recipe


def add_recipe_numbers(parser: argparse._ActionsContainer, helps: Mapping[str, str]) -> None:
    """Add an option for each entry, by name; the recipe's default stands behind its help."""
    for name, text in helps.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=int,
            metavar="N",
            help=f"{text} (default {Recipe.model_fields[name].default})",
        )
