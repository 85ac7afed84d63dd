"""What to tell the user of an entry that no recipe can hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel, ValidationError

from permllm_offline.errors import OfflineError
from permllm_offline.recipe.schema import Recipe

_UNKNOWN = ("extra_forbidden", "invalid_key")
_MAPPING = ("model_type", "it should be a mapping of entries, as in recipe.yaml")
_OPTIONS = (
    *("method", "reconstruction", "pattern", "ignore", "dataset", "text_field", "num_samples"),
    *("sequence_length", "seed", "device", "dtype", "values"),
)
"""Entries that ``prune`` has an option for; the others are in recipe files alone."""


def refusal(error: ValidationError, given: Mapping[str, Any]) -> OfflineError:
    """Say what is wrong with the first entry that a recipe cannot hold, and what would be right.

    Args:
        error: of ``Recipe``.
        given: entries that the user gave as options or arguments; others are of the recipe file.
    """
    found = error.errors()
    entry, schema = _entry(found[0]["loc"])
    # Of the kinds of value that an entry may be, the likeliest is the one that is wrong inside.
    first = max(
        (one for one in found if _entry(one["loc"])[0] == entry), key=lambda one: len(one["loc"])
    )
    name = ".".join(entry)
    if first["type"] in _UNKNOWN:
        close = get_close_matches(entry[-1], schema.model_fields, 1)
        hint = f"did you mean {close[0]}? Known" if close else "known"
        return OfflineError(
            f"the recipe has no entry {name}: {hint} are {', '.join(schema.model_fields)}."
        )
    if first["type"] == "missing":
        return OfflineError(f"the recipe has no {name}: give it one.")
    place = " of the recipe file"
    if _holds(given, entry):
        name, place = option_of(entry) or name, ""
    kind, mapping = _MAPPING
    rule = mapping if first["type"] == kind else first["msg"].replace("Input", "it", 1)
    rule = rule.replace("a valid tuple", "a list")
    required = len(entry) == 1 and Recipe.model_fields[entry[0]].is_required()
    otherwise = "." if required else ", or leave it out."
    return OfflineError(
        f"{name} {first['input']!r}{place} cannot be used: {rule}. Give such a value{otherwise}"
    )


def option_of(entry: Sequence[str]) -> str | None:
    """The option of ``prune`` for an entry of the recipe, or None where there is none."""
    return f"--{entry[0].replace('_', '-')}" if len(entry) == 1 and entry[0] in _OPTIONS else None


def _entry(location: Sequence[str | int]) -> tuple[list[str], type[BaseModel]]:
    """The entry at a location, and the schema that lists it or its neighbours.

    What follows its name, a kind of value and a place in it, is left out.
    """
    schema: type[BaseModel] = Recipe
    entry: list[str] = []
    for name in map(str, location):
        entry.append(name)
        field = schema.model_fields.get(name)
        if field is None or not isinstance(field.default, BaseModel):
            break
        schema = type(field.default)
    return entry, schema


def _holds(entries: Mapping[str, Any], entry: Sequence[str]) -> bool:
    first, *rest = entry
    if first not in entries:
        return False
    nested = entries[first]
    return not rest or (isinstance(nested, Mapping) and _holds(nested, rest))
