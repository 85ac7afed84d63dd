"""A dense model with what was measured on it: all that a permutation may be found from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.prune_plan import Plan
from permllm_offline.recipe.schema import Recipe
from permllm_offline.run.steps import Work
from permllm_offline.sparsity.importance import Scores

Permutations = Sequence[Mapping[str, Tensor]]
"""Per decoder layer, group name -> block-local uint8 [in_features]; absent where not permuted."""

LearningCurve = list[dict[str, float]]
"""Per step: its number, training loss and, where it was measured, validation loss.

Where decoder layers learn span by span, ``first_layer`` and ``last_layer`` name those of the step.
"""


@dataclass(frozen=True)
class LearnedPermutations:
    """Permutations of a model, and how they were learned.

    ``layers`` are the numbers of the decoder layers that learned theirs; the others have the
    heuristic reallocation. ``sensitivities`` holds a number for each decoder layer where they
    chose ``layers``, or is None.
    """

    permutations: Permutations
    curve: LearningCurve
    layers: Sequence[int]
    sensitivities: Sequence[float] | None = None


@dataclass(frozen=True)
class Calibrated:
    """A dense model and its statistics.

    ``score(layer, layout)`` gives, for each linear of the group, its importance: float32
    [out_features, in_features]. ``windows`` is int64 [windows, sequence_length];
    ``hidden_states`` is the dense model's last hidden state for each,
    [windows, sequence_length, hidden], or None where nothing reads it; ``energies[layer][group]``
    the mean square of each input channel, float32 [in_features]. ``work`` keeps the steps that are
    finished.
    """

    model: Any
    plan: Plan
    recipe: Recipe
    windows: Tensor | None
    hidden_states: Tensor | None
    score: Callable[[int, GroupLayout], Mapping[str, Scores]]
    energies: Sequence[Mapping[str, Tensor]] | None = None
    work: Work = field(default_factory=Work)
