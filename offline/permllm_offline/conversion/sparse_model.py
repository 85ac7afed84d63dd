"""A model that is sparse already: a plain one with zeros, and what was decided of its layers.

That of a checkpoint of this format has its channels in the order that is served.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from torch import Tensor

from permllm_offline.model.family import Family, SharedInputGroup
from permllm_offline.model.heads import heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.plain_tensors import PlainTensors
from permllm_offline.sparsity.bake import bake_layer
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_vllm.checkpoint.errors import raise_if_any
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.numbers import number_problems
from permllm_vllm.checkpoint.packing import pack_mask, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import unpermute_columns
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import BIAS, WEIGHT_MASK, WEIGHT_PACKED


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


class ServedTensors:
    """The tensors of a sparse checkpoint; rows that a fold moved stay where they are.

    Run-time permutations of columns are undone, so that a layer reads what the model gives it.
    """

    def __init__(self, reader: CheckpointReader) -> None:
        assert reader.quantization is not None
        self.reader, self.quantization = reader, reader.quantization
        self.pattern = Pattern.parse(reader.quantization.pattern)
        self.sparse = frozenset(reader.sparse_layers())
        self._names = list(filter(None, map(self._plain, reader.names())))

    def _plain(self, name: str) -> str:
        """What a plain checkpoint calls a stored tensor; empty where it has none."""
        module, _, kind = name.rpartition(".")
        if module not in self.sparse or kind == BIAS:
            return name
        return f"{module}.weight" if kind == WEIGHT_PACKED else ""

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return self._names

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of the dense tensor, which is not read."""
        module, _, kind = name.rpartition(".")
        if module not in self.sparse or kind == BIAS:
            return self.reader.header(name)
        rows, octets = self.reader.header(f"{module}.{WEIGHT_MASK}").shape
        return TensorHeader((rows, 8 * octets), self.quantization.value_dtype)

    def tensor(self, name: str) -> Tensor:
        """The dense tensor; raises CheckpointError where contents break a rule."""
        module, _, kind = name.rpartition(".")
        if module not in self.sparse or kind == BIAS:
            return self.reader.tensor(name)
        return self.reader.layer(module).dense(self.pattern, self.quantization.block_size)


def served_model(reader: CheckpointReader, family: Family, config: Any) -> SparseModel:
    """See a checkpoint of this format as a sparse model: its masks and run-time permutations.

    A folded permutation is no part of it: rows and columns have moved, and stay.
    """
    tensors = ServedTensors(reader)
    block_size = tensors.quantization.block_size

    def decision(index: int) -> LayerDecision:
        def stored_sparse(linear: str) -> bool:
            return family.stored_name(index, linear) in tensors.sparse

        def decide(group: SharedInputGroup) -> GroupDecision:
            masks, permutation = {}, None
            for linear in group.linears:
                layer = reader.layer(family.stored_name(index, linear))
                mask = unpack_mask(layer.mask)
                if layer.input_permutation is not None:
                    permutation = layer.input_permutation
                    mask = unpermute_columns(mask, permutation, block_size)
                masks[linear] = pack_mask(mask)
            width = layer.in_features
            layout = GroupLayout(group, width, block_size, heads_of(config))
            fed = all(stored_sparse(part.linear) for part in group.fold_into)
            if permutation is not None or not fed:
                layout = layout.at_run_time()
            return GroupDecision(layout, permutation, masks, {})

        groups = family.groups_of(stored_sparse)
        return [decide(group) for group in groups if stored_sparse(group.linears[0])]

    return SparseModel(family, tensors, tensors.pattern, config.num_hidden_layers, decision)
