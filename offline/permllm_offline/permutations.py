"""The kinds of permutation that a method can name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from permllm_offline.calibrated import Calibrated, LearningCurve, Permutations
from permllm_offline.channel_permutation import allocate_group
from permllm_offline.learning import learn_permutations


class Finder(Protocol):
    """Finds the permutations of a model."""

    def __call__(self, calibrated: Calibrated) -> tuple[Permutations, LearningCurve]:
        """Return the permutations and the learning curve (empty where nothing is learned)."""


@dataclass(frozen=True)
class PermutationKind:
    """An entry of the table."""

    find: Finder
    permutes: bool
    needs_hidden_states: bool = False


def no_permutation(calibrated: Calibrated) -> tuple[Permutations, LearningCurve]:
    """Leave every channel where it is."""
    return [{} for _ in calibrated.plan.layers], []


def heuristic_reallocation(calibrated: Calibrated) -> tuple[Permutations, LearningCurve]:
    """Deal the channels of each block over its groups by importance (CP)."""
    pattern = calibrated.recipe.parsed_pattern()
    permutations = [
        {
            layout.group.name: layout.expand(
                allocate_group(layout, calibrated.score(index, layout), pattern)
            )
            for layout in layouts
        }
        for index, layouts in enumerate(calibrated.plan.layers)
    ]
    return permutations, []


PERMUTATIONS: Mapping[str, PermutationKind] = {
    "none": PermutationKind(no_permutation, permutes=False),
    "cp": PermutationKind(heuristic_reallocation, permutes=True),
    "learned": PermutationKind(learn_permutations, permutes=True, needs_hidden_states=True),
}
