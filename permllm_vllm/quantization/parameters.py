"""Load-time parameters of a sparse linear layer, one class for each kind of tensor."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Module, Parameter

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.int4 import repeat_multipliers
from permllm_vllm.compat import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    ModelWeightParameter,
)
from permllm_vllm.quantization.contents import require_bijection, shared_permutation
from permllm_vllm.quantization.sources import ShardId, TensorSource


def load_checked(
    param: "CheckedParameter", loaded_weight: Tensor, shard_id: ShardId = None
) -> None:
    """The `weight_loader` of every parameter here: check the tensor, count it, place it.

    A plain function that takes everything from `param`, because vLLM's weight reloading copies a
    parameter's attributes to new parameters. It also calls the loader once on the meta device to
    measure sizes, which must not count.
    """
    parts = param.source.layer.parts(shard_id)
    param.source.check(loaded_weight, parts)
    if not param.is_meta:
        param.source.count(parts)
    param.place(loaded_weight, shard_id)


class CheckedParameter(BasevLLMParameter):
    """A vLLM parameter that checks and counts the checkpoint tensors it is made of."""

    def __init__(
        self, *, source: TensorSource, weight_loader: Callable[..., None], **kwargs: Any
    ) -> None:
        super().__init__(weight_loader=load_checked, **kwargs)
        self.source = source
        self.layer_loader = weight_loader

    def place(self, loaded_weight: Tensor, shard_id: ShardId) -> None:
        """Copy this rank's slice of a checkpoint tensor to its place: the layer knows which."""
        if shard_id is None:
            self.layer_loader(self, loaded_weight)
        else:
            self.layer_loader(self, loaded_weight, shard_id)


class SparseWeightParameter(CheckedParameter, ModelWeightParameter):
    """Kept values `[out, in*N/M]`, two in a byte of int4, or mask `[out, in/8]`.

    Both are compressed along the input dimension by a constant factor, so vLLM's slices of rows
    and columns are right as they are.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(input_dim=1, output_dim=0, **kwargs)


class MultiplierParameter(SparseWeightParameter):
    """Multipliers `[out, in/channels]` of int4 values, repeated for as many channels each."""

    def __init__(self, *, channels: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.channels = channels

    def place(self, loaded_weight: Tensor, shard_id: ShardId) -> None:
        """Copy this rank's slice, of whole multipliers whatever it cuts."""
        inputs = self.source.layer.input_size
        super().place(repeat_multipliers(loaded_weight, self.channels, inputs), shard_id)


class RowScaleParameter(CheckedParameter, ChannelQuantScaleParameter):
    """Scale of every output row `[out]`."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(output_dim=0, **kwargs)


class InputPermutationParameter(CheckedParameter):
    """Block-local run-time permutation `[parts, in]`: one row per part of a fused layer.

    The parts of a fused layer read one input and must agree; each is kept until all are there.
    """

    def place(self, loaded_weight: Tensor, shard_id: ShardId) -> None:
        """Copy this rank's input channels; block-local values need no rebasing."""
        channels = self.data.shape[1]
        if loaded_weight.numel() != channels:  # row-parallel: the input is cut
            loaded_weight = loaded_weight.narrow(0, self.tp_rank * channels, channels)
        for part in self.source.layer.parts(shard_id):
            self.data[part].copy_(loaded_weight)

    def shared(self) -> Tensor:
        """The permutation `[in]` of all parts; CheckpointError where they differ or are invalid."""
        return shared_permutation(self.source, self.data)


class FoldedPermutationParameter(CheckedParameter):
    """A permutation `[in]` that was moved into the preceding layer: checked, and nobody's after.

    It has a place while the layer is loaded, because vLLM's weight reloading takes a layer for
    complete when as many elements have come as its parameters have.
    """

    def place(self, loaded_weight: Tensor, shard_id: ShardId) -> None:
        """Check the whole tensor: a rank's slice may cut a block in two."""
        require_bijection(self.source, loaded_weight, shard_id)
        channels = self.data.numel()
        if loaded_weight.numel() != channels:
            loaded_weight = loaded_weight.narrow(0, self.tp_rank * channels, channels)
        self.data.copy_(loaded_weight)


def refuse(param: "UnexpectedParameter", loaded_weight: Tensor, shard_id: ShardId = None) -> None:
    """The `weight_loader` of what must not be there; raises CheckpointError with its name."""
    source = param.source
    raise CheckpointError(
        f"{source.name(source.layer.parts(shard_id))} is in the checkpoint, but its "
        "quantization_config describes the layer without it (see `ignore`, `runtime_permuted`, "
        "`folded` and `value_dtype`). config.json and the tensors do not belong together: copy the "
        "checkpoint again, or run `permllm-offline prune` again."
    )


class UnexpectedParameter(BasevLLMParameter):
    """Stands for a tensor that this layer does not have: vLLM's own error would name no tensor."""

    def __init__(
        self, *, source: TensorSource, weight_loader: Callable[..., None], **kwargs: Any
    ) -> None:
        super().__init__(weight_loader=refuse, **kwargs)
        self.source = source


def register_packed(layer: Module, name: str, tensor: Tensor | None) -> None:
    """Let a layer keep a tensor of what a backend packed, or None in its place."""
    layer.register_parameter(
        name, None if tensor is None else Parameter(tensor, requires_grad=False)
    )


def packed_tensor(layer: Module, name: str) -> Tensor | None:
    """Return what `register_packed` let a layer keep.

    vLLM takes the names of what a layer does not have away where new weights are loaded into other
    layers alone.
    """
    tensor: Tensor | None = getattr(layer, name, None)
    return tensor
