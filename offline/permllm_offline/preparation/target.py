"""The pattern of a recipe that names none: that of the device which is to serve the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from permllm_offline.errors import OfflineError
from permllm_offline.preparation.method_parts import find_parts
from permllm_offline.preparation.recipe_input import make_recipe
from permllm_offline.recipe.schema import Recipe
from permllm_vllm.checkpoint.pattern import SUPPORTED, Pattern
from permllm_vllm.diagnosis import target as targets

Target = Literal["auto", "amx", "cpu", "gpu"]
"""A key of ``TARGETS``, or ``auto`` for what this machine is."""


def recipe_for(
    target: str | None,
    entries: Mapping[str, Any],
    effort: str | None = None,
    preset_name: str | None = None,
    recorded: Mapping[str, Any] | None = None,
) -> Recipe:
    """Build a recipe as ``make_recipe`` does, with the pattern of a target.

    Args:
        target: comes after a pattern in ``entries`` and before what is recorded; None is ``auto``,
            which comes last.
        entries: of the recipe; None stands for what comes after them.
        effort: see ``make_recipe``.
        preset_name: see ``make_recipe``.
        recorded: entries of a recipe file.

    Raises:
        OfflineError: an unknown target, or what ``make_recipe`` raises.
    """
    if target is not None:
        check_target(target)
        recorded = {name: value for name, value in (recorded or {}).items() if name != "pattern"}
    made = make_recipe(entries, effort, preset_name, recorded)
    if entries.get("pattern") is not None:
        return made
    if target is None and "pattern" in made.model_fields_set:
        return made
    pattern = pattern_of(target or targets.AUTO, made)
    return make_recipe({**entries, "pattern": pattern}, effort, preset_name, recorded)


def check_target(target: str) -> None:
    """Raise OfflineError for a target that is not known."""
    known = [targets.AUTO, *targets.TARGETS]
    if target not in known:
        raise OfflineError(f"target {target!r} is not known: give one of {', '.join(known)}.")


def pattern_of(target: str, recipe: Recipe) -> str:
    """The pattern of a known target; a stricter one where a learned permutation needs room.

    Within blocks that one group fills there is nothing to learn.
    """
    wanted = targets.TARGETS[targets.detected() if target == targets.AUTO else target]
    if not find_parts(recipe.method).permutation.learns:
        return wanted
    allowed = SUPPORTED[: SUPPORTED.index(wanted) + 1]
    return [text for text in allowed if Pattern.parse(text).group < recipe.block_size][-1]
