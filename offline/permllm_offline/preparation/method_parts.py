"""What the names in a method stand for: its importance, permutation and reconstruction."""

from __future__ import annotations

from dataclasses import dataclass, replace

from permllm_offline.permutation.kinds import PERMUTATIONS, PermutationKind
from permllm_offline.recipe.methods import parse_method
from permllm_offline.recipe.schema import Recipe
from permllm_offline.reconstruction.kinds import find_reconstruction
from permllm_offline.reconstruction.layer_work import Reconstruction
from permllm_offline.sparsity.importance import IMPORTANCES, Importance


@dataclass(frozen=True)
class MethodParts:
    """Entries of the tables that a method names."""

    importance: Importance
    permutation: PermutationKind
    reconstruction: Reconstruction

    @property
    def reads_text(self) -> bool:
        """Whether calibration text decides anything."""
        return (
            self.importance.needs_activations
            or self.permutation.learns
            or self.reconstruction.needs_windows
        )


def find_parts(method: object, reconstruction: object = None) -> MethodParts:
    """Look up the parts of a method.

    Args:
        method: key of ``recipe.methods.METHODS``.
        reconstruction: key of ``RECONSTRUCTIONS`` in place of the method's own, or None.

    Raises:
        OfflineError: either is not known.
    """
    named = parse_method(method)
    own = named.reconstruction if reconstruction is None else reconstruction
    return MethodParts(
        IMPORTANCES[named.importance], PERMUTATIONS[named.permutation], find_reconstruction(own)
    )


def reads_activations(recipe: Recipe) -> bool:
    """Whether calibration text, where there is any, runs through the decoder layers."""
    return parts_of(recipe).reads_text or recipe.values != "auto"


def title_of(recipe: Recipe) -> str:
    """Name a recipe's method, and the reconstruction where that is not the method's own."""
    chosen = recipe.parsed_method()
    if chosen == parse_method(recipe.method):
        return recipe.method
    return f"{recipe.method}, reconstruction {chosen.reconstruction}"


def summary_of(recipe: Recipe) -> str:
    """Say in a line what is done: the method's summary where its own reconstruction is taken."""
    method, chosen = parse_method(recipe.method), recipe.parsed_method()
    parts = parts_of(recipe)
    if parts == find_parts(recipe.method):
        return method.summary
    return (
        f"importances of {chosen.importance}; {parts.permutation.summary}; "
        f"{parts.reconstruction.summary}"
    )


def parts_of(recipe: Recipe) -> MethodParts:
    """Look up the parts of a recipe's method; raises OfflineError where one is not known.

    Inside blocks that one group of the pattern fills nothing is permuted: a group keeps the same
    weights in whatever order its channels are.
    """
    parts = find_parts(recipe.method, recipe.reconstruction)
    if recipe.parsed_pattern().group < recipe.block_size or parts.permutation.across_blocks:
        return parts
    return replace(parts, permutation=PERMUTATIONS["none"])
