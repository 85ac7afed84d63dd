"""A recipe from what a user gives: options, a recipe file, an effort and a preset."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from permllm_offline.errors import OfflineError
from permllm_offline.preparation.method_parts import find_parts, parts_of
from permllm_offline.recipe.methods import BEST
from permllm_offline.recipe.presets import preset
from permllm_offline.recipe.refusals import refusal
from permllm_offline.recipe.schema import Recipe
from permllm_vllm.checkpoint.int4 import GROUP
from permllm_vllm.checkpoint.schema import BLOCK_SIZES


class _Loader(yaml.SafeLoader):
    """Safe YAML without numbers to the base 60: ``2:4`` is a pattern, not 124."""


def _without_base_60(
    resolvers: Mapping[str, Sequence[tuple[str, re.Pattern[str]]]],
) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    """Resolvers that take nothing with a colon for a number."""
    numbers = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
    return {
        first: [
            (tag, re.compile(rf"(?![^:]*:)(?:{pattern.pattern})", pattern.flags))
            if tag in numbers
            else (tag, pattern)
            for tag, pattern in found
        ]
        for first, found in resolvers.items()
    }


_Loader.yaml_implicit_resolvers = _without_base_60(yaml.SafeLoader.yaml_implicit_resolvers)


def read_recipe(file: Path) -> dict[str, Any]:
    """Read the entries of a recipe file, YAML as ``to_yaml`` writes it or as a person does.

    Raises:
        OfflineError: no readable file, or no mapping in it.
    """
    try:
        entries = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OfflineError(
            f"cannot read recipe {file}: {_reason(error)}. Give a YAML file like the recipe.yaml "
            "beside a checkpoint."
        ) from error
    if not isinstance(entries, dict):
        raise OfflineError(
            f"recipe {file} holds {type(entries).__name__}, not a mapping of options. Give a YAML "
            "file like the recipe.yaml beside a checkpoint."
        )
    return entries


def _reason(error: Exception) -> str:
    """One line: of YAML that cannot be parsed, what is wrong and where."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return str(error).strip().splitlines()[0]


def overridden(entries: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Entries with changes on top, the nested ones one by one; a change to None is no change."""
    result = dict(entries)
    for name, value in changes.items():
        nested = result.get(name)
        if isinstance(value, Mapping) and isinstance(nested, Mapping):
            result[name] = overridden(nested, value)
        elif value is not None:
            result[name] = value
    return result


EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "low": {"num_samples": 96, "distillation": {"steps": 150, "self_windows": 32}},
    "default": {"num_samples": 192, "distillation": {"steps": 300, "self_windows": 64}},
    "high": {"num_samples": 768, "distillation": {"steps": 1200, "self_windows": 256}},
}
"""What each effort gives a recipe that distils, wherever the user gives nothing."""


def _said(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if value is not None}


def make_recipe(
    entries: Mapping[str, Any],
    effort: str | None = None,
    preset_name: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe from user input.

    Args:
        entries: of the recipe; None stands for what comes after them.
        effort: key of ``EFFORTS``, of use to methods that distil: it comes before what is
            recorded. None is the default effort, which comes last.
        preset_name: of ``recipe.presets.PRESETS``, where neither entries nor record say anything.
        recorded: entries of a recipe file, where ``entries`` say nothing; ``preset`` may be one of
            them. A reconstruction belongs
            to the method that it is recorded with: where ``entries`` name one, it is left out.

    Raises:
        OfflineError: unknown entry, method, reconstruction, pattern, block size, effort or preset,
            or a value that is none of its entry's.
    """
    if effort is not None and effort not in EFFORTS:
        raise OfflineError(f"effort {effort!r} is not known: give one of {', '.join(EFFORTS)}.")
    given, recorded = _said(entries), _said(recorded or {})
    own_preset = recorded.pop("preset", None)
    preset_name = own_preset if preset_name is None else preset_name
    if "method" in given:  # with a reconstruction of its own
        recorded.pop("reconstruction", None)
    if preset_name is not None:
        method = overridden(recorded, given).get("method")
        recorded = overridden(preset(preset_name, method), recorded)
    entries = overridden(recorded, given)
    parts = find_parts(entries.get("method", BEST), entries.get("reconstruction"))
    if parts.reconstruction.distils:
        constants = EFFORTS[effort or "default"]
        if effort is None:
            entries = overridden(constants, entries)
        else:
            entries = overridden(overridden(recorded, constants), given)
    try:
        recipe = Recipe.model_validate(entries)
    except ValidationError as error:
        raise refusal(error, given) from error
    try:
        recipe.parsed_pattern()
    except ValueError as error:
        raise OfflineError(str(error)) from error
    if recipe.block_size not in BLOCK_SIZES:
        raise OfflineError(
            f"block size {recipe.block_size} is not supported: give one of "
            f"{', '.join(map(str, BLOCK_SIZES))}."
        )
    permutation = parts_of(recipe).permutation
    if parts.permutation.learns and not permutation.learns:
        raise OfflineError(
            f"--method {recipe.method} learns which channels meet in a group, and at the pattern "
            f"{recipe.pattern} one group fills a block of {recipe.block_size}: nothing is to be "
            "learned. Give --pattern 2:4, 4:8 or 8:16 with blocks of 64, or another method."
        )
    blocks = "the whole layer" if permutation.across_blocks else f"blocks of {recipe.block_size}"
    if (
        recipe.values == "int4"
        and permutation.permutes
        and (permutation.across_blocks or recipe.block_size > GROUP)
    ):
        raise OfflineError(
            f"--values int4 rounds inputs in groups of {GROUP}, which permutations in {blocks} "
            f"take apart: give block_size {GROUP} and a method that keeps to it, or int8 values."
        )
    return recipe
