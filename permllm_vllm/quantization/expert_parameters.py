"""Load-time parameters of sparse experts: of one linear layer of all of them, one tensor a kind."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.int4 import (
    channels_of_multiplier,
    multiplier_count,
    repeat_multipliers,
)
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.quantization.contents import require_bijection
from permllm_vllm.quantization.sources import CheckpointLayer, TensorSource

PARTS = {"w1": 0, "w3": 1, "w2": 0}
"""Of vLLM's shards: gate and up are the parts of one layer, down is another."""
REGISTERED = (*schema.SPARSE_KINDS, "weight", schema.BIAS)
"""Kinds of parameters while experts are loaded: the format's, and what dense ones have."""
PERMUTATIONS = (schema.INPUT_PERMUTATION, schema.FOLDED_PERMUTATION)


@dataclass(frozen=True)
class ExpertStack:
    """One linear layer of all experts of this rank: gate and up (`w13`), or down (`w2`).

    `layers` are what the checkpoint holds for each; `output_sizes` and `columns` the rows of the
    parts and the inputs on this rank, which is number `rank` of those that cut a layer.
    `local_expert` gives the place of an expert among those of this rank, or -1.
    """

    name: str
    layers: tuple[CheckpointLayer, ...]
    output_sizes: tuple[int, ...]
    columns: int
    rank: int
    permuted: bool
    folded: bool
    local_expert: Callable[[int], int]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of tensors that the format asks for."""
        kinds = [*schema.value_kinds(self.layers[0].checkpoint.value_dtype), schema.WEIGHT_MASK]
        for asked, kind in zip((self.permuted, self.folded), PERMUTATIONS, strict=True):
            kinds += [kind] * asked
        return tuple(kinds)

    def empty(self, kind: str, dtype: torch.dtype) -> Tensor:
        """Room for tensors of a kind: `[experts, ...]`, a copy of each part for permutations."""
        if kind in PERMUTATIONS:
            shape: tuple[int, ...] = (len(self.output_sizes), self.columns)
        else:
            checkpoint, rows = self.layers[0].checkpoint, sum(self.output_sizes)
            pattern, values = Pattern.parse(checkpoint.pattern), checkpoint.value_dtype
            shape = schema.tensor_shape(kind, rows, self.columns, pattern, values)
            if kind == schema.WEIGHT_MULTIPLIER:
                shape = rows, multiplier_count(self.columns, self.layers[0].input_size)
        return torch.empty((len(self.layers), *shape), dtype=dtype)

    def register(self, layer: Module) -> None:
        """Create the parameters of a layer, and those that refuse what must not be there."""
        value_dtype = self.layers[0].checkpoint.value_dtype
        loader: Callable[..., bool | None]
        for kind in REGISTERED:
            if kind in self.kinds:
                dtype = schema.tensor_dtype(kind, value_dtype)
                assert dtype is not None  # only biases may have any
                data, loader = self.empty(kind, dtype), _load
            else:
                data, loader = torch.empty(0), _refuse
            parameter: Any = Parameter(data, requires_grad=False)
            parameter.stack, parameter.weight_loader = self, loader
            parameter.sources = [TensorSource(one, kind) for one in self.layers]
            layer.register_parameter(f"{self.name}_{kind}", parameter)

    def loaded(self, layer: Module) -> dict[str, Any]:
        """The parameters by kind, every tensor of which must have come; empty when packed before.

        Raises:
            CheckpointError: a tensor is missing.
        """
        found: dict[str, Any] = {
            kind: getattr(layer, f"{self.name}_{kind}", None) for kind in self.kinds
        }
        if not all(hasattr(parameter, "sources") for parameter in found.values()):
            return {}
        for parameter in found.values():
            for source in parameter.sources:
                source.require_complete()
                source.loaded.clear()  # vLLM may reload into copies that share the source
        return found

    def drop(self, layer: Module) -> None:
        """Delete the parameters."""
        for kind in REGISTERED:
            delattr(layer, f"{self.name}_{kind}")

    def place(self, kind: str, data: Tensor, tensor: Tensor, part: int) -> None:
        """Copy this rank's slice of a checkpoint tensor to its place in an expert's `data`."""
        if kind in PERMUTATIONS:
            data[part].copy_(self._cut(tensor, 0, self.columns))
            return
        if kind == schema.WEIGHT_MULTIPLIER:
            inputs = self.layers[0].input_size
            channels = channels_of_multiplier(self.columns, inputs)
            tensor = repeat_multipliers(tensor, channels, inputs)
        rows = sum(self.output_sizes[:part])
        target = data.narrow(0, rows, self.output_sizes[part])
        for dimension in range(tensor.ndim):
            tensor = self._cut(tensor, dimension, target.shape[dimension])
        target.copy_(tensor)

    def _cut(self, tensor: Tensor, dimension: int, size: int) -> Tensor:
        if tensor.shape[dimension] == size:
            return tensor
        return tensor.narrow(dimension, self.rank * size, size)


def _load(
    param: Any,
    loaded_weight: Tensor,
    weight_name: str,
    shard_id: str,
    expert_id: int,
    return_success: bool = False,
) -> bool | None:
    """The `weight_loader` of every parameter: check the tensor, count it, place it.

    A plain function that takes everything from `param`, as `parameters.load_checked`.
    """
    expert = param.stack.local_expert(expert_id)
    if expert < 0:  # of another rank, and done with
        return True if return_success else None
    source, part = param.sources[expert], PARTS[shard_id]
    source.check(loaded_weight, (part,))
    if not param.is_meta:
        source.count((part,))
    if source.kind == schema.FOLDED_PERMUTATION:  # whole: a rank's slice may cut a block in two
        require_bijection(source, loaded_weight, part)
    param.stack.place(source.kind, param.data[expert], loaded_weight, part)
    return True if return_success else None


def _refuse(
    param: Any, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int, **_: Any
) -> bool:
    """The `weight_loader` of what must not be there; raises CheckpointError with its name.

    Tensors of another rank's experts are left for that rank to refuse.
    """
    expert = param.stack.local_expert(expert_id)
    if expert < 0:
        return True
    source = param.sources[expert]
    raise CheckpointError(
        f"{source.name((PARTS[shard_id],))} is in the checkpoint, but its quantization_config "
        "describes experts without it (see `ignore`, `runtime_permuted`, `folded` and "
        "`value_dtype`). config.json and the tensors do not belong together: copy the checkpoint "
        "again, or run `permllm-offline prune` again."
    )
