"""A model that is sparse already: a plain one with zeros, and what was decided of its layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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

    def weights(self, index: int, decision: LayerDecision) -> Mapping[str, Tensor]:
        """Weights and biases of the sparse linears of a decoder layer, by part.

        Raises:
            CheckpointError: one has inf or nan.
        """
        read: dict[str, Tensor] = {}
        for part, name in self._parts(index, decision):
            tensor = self.tensors.tensor(name)
            raise_if_any(number_problems(name, tensor))
            read[part] = tensor
        return read

    def baked(
        self, index: int, decision: LayerDecision, rounded: RoundedLayer | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the stored tensors of a decoder layer's sparse linears."""
        weights = self.weights(index, decision)
        yield from bake_layer(self.stored_name(index), weights, decision, self.pattern, rounded)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.tensors.names())

    def _parts(self, index: int, decision: LayerDecision) -> Iterator[tuple[str, str]]:
        """Weights and biases of the sparse linears, and their names in a plain checkpoint."""
        for group in decision:
            for linear in group.masks:
                for part in (f"{linear}.weight", f"{linear}.bias"):
                    name = self.family.stored_name(index, part)
                    if name in self._names:
                        yield part, name
