"""The kinds of permutation that a method can name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from permllm_offline.layout import GroupLayout
from permllm_offline.plan import Plan
from permllm_offline.recipe import Recipe


@dataclass(frozen=True)
class Calibrated:
    """A dense model with what was measured on it: all that a permutation may be found from.

    ``score(layer, group)`` gives, for each linear of the group, its importance: float32
    [out_features, in_features]. ``hidden_states`` is the dense model's last hidden state per
    window, [windows, sequence_length, hidden].
    """

    model: nn.Module
    plan: Plan
    recipe: Recipe
    windows: Tensor | None
    hidden_states: Tensor | None
    score: Callable[[int, GroupLayout], Mapping[str, Tensor]]


Permutations = Sequence[Mapping[str, Tensor]]
"""Per decoder layer, group name -> block-local uint8 [in_features]; absent where not permuted."""


class Finder(Protocol):
    """Finds the permutations of a model."""

    def __call__(self, calibrated: Calibrated) -> tuple[Permutations, list[dict[str, float]]]:
        """Return the permutations and the learning curve (empty where nothing is learned)."""


@dataclass(frozen=True)
class PermutationKind:
    """An entry of the table."""

    find: Finder
    permutes: bool
    needs_hidden_states: bool = False


def no_permutation(calibrated: Calibrated) -> tuple[Permutations, list[dict[str, float]]]:
    """Leave every channel where it is."""
    return [{} for _ in calibrated.plan.layers], []


PERMUTATIONS: Mapping[str, PermutationKind] = {
    "none": PermutationKind(no_permutation, permutes=False),
}
