"""A model that is sparse already: a plain one with zeros, and what was decided of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

from torch import Tensor

from permllm_offline.model.family import Family
from permllm_offline.model.plain_tensors import PlainTensors
from permllm_offline.sparsity.bake import bake_layer
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_vllm.checkpoint.errors import raise_if_any
from permllm_vllm.checkpoint.numbers import number_problems
from permllm_vllm.checkpoint.pattern import Pattern


@dataclass(frozen=True)
class SparseModel:
    """Tensors of a plain checkpoint, and for every decoder layer which weights are kept.

    ``decision`` gives that of a layer, in the order of channels that the tensors have.
    """

    family: Family
    tensors: PlainTensors
    pattern: Pattern
    layers: int
    decision: Callable[[int], LayerDecision]

    def stored_name(self, index: int) -> Callable[[str], str]:
        """What the checkpoint calls a part of a decoder layer."""
        return partial(self.family.stored_name, index)

    def baked(
        self, index: int, decision: LayerDecision, rounded: RoundedLayer | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the stored tensors of a decoder layer's sparse linears.

        Raises:
            CheckpointError: a weight or bias has inf or nan.
        """
        weights = dict(self._weights(index, decision))
        yield from bake_layer(self.stored_name(index), weights, decision, self.pattern, rounded)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tensors.names())

    def _weights(self, index: int, decision: LayerDecision) -> Iterator[tuple[str, Tensor]]:
        """Weights and biases of the sparse linears, by what the decoder layer calls them."""
        for group in decision:
            for linear in group.masks:
                for part in (f"{linear}.weight", f"{linear}.bias"):
                    name = self.family.stored_name(index, part)
                    if name in self._names:
                        tensor = self.tensors.tensor(name)
                        raise_if_any(number_problems(name, tensor))
                        yield part, tensor
