"""The linear method: loads a sparse layer's tensors, packs them once, multiplies."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import permllm_vllm.ops  # noqa: F401  (defines torch.ops.permllm)
from permllm_vllm.backends import CheckpointWeights, require_pattern
from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.int4 import channels_of_multiplier, multiplier_count, stored_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.compat import (
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from permllm_vllm.quantization.contents import check_mask, check_numbers
from permllm_vllm.quantization.parameters import (
    CheckedParameter,
    FoldedPermutationParameter,
    InputPermutationParameter,
    MultiplierParameter,
    RowScaleParameter,
    SparseWeightParameter,
    UnexpectedParameter,
    packed_tensor,
    register_packed,
)
from permllm_vllm.quantization.partition import require_divisible
from permllm_vllm.quantization.served import ServedLayers
from permllm_vllm.quantization.sources import CheckpointLayer, ShardId, TensorSource
from permllm_vllm.quantization.unfolding import Unfolding
from permllm_vllm.quantization.weight_files import refuse_load_format

_sparse_linear = torch.ops.permllm.sparse_linear.default

WEIGHT_METADATA = "weight_metadata"
LOADED = (*schema.SPARSE_KINDS, "weight")
"""Parameters of a layer while it is loaded: the format's, and what a dense layer has."""


@register_weight_loader_v2_supported_method
class PermLLMLinearMethod(LinearMethodBase):
    """N:M sparse weights of one (possibly fused) linear layer.

    After loading, the layer keeps what the backend packed under the names `weight_packed`,
    `weight_metadata`, `input_permutation` and `weight_scale` (None where there is nothing).

    `prefix` is vLLM's name of the layer, `modules` those in the checkpoint; `unfolding` is there
    where folded permutations must be taken out again.
    """

    def __init__(
        self,
        checkpoint: schema.QuantizationConfig,
        served: ServedLayers,
        prefix: str,
        modules: Sequence[str],
        *,
        permuted: bool,
        folded: bool,
        unfolding: Unfolding | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.pattern = Pattern.parse(checkpoint.pattern)
        self.served = served
        self.prefix = prefix
        self.modules = modules
        self.permuted = permuted
        self.folded = folded
        self.unfolding = unfolding

    def create_weights(
        self,
        layer: Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Register the tensors of the checkpoint format, cut to this tensor-parallel rank.

        Raises:
            CheckpointError: vLLM is to read no checkpoint (`--load-format dummy`, and others).
            RuntimeError: the device cannot serve the pattern.
        """
        refuse_load_format()
        require_pattern(torch.empty(0).device, self.pattern)
        block_size = self.checkpoint.block_size if self._permutation_kind else None
        require_divisible(
            self.modules, input_size, input_size_per_partition, block_size, self.pattern
        )
        self.output_sizes = list(output_partition_sizes)
        self.out_features = sum(output_partition_sizes)
        self.dtype = params_dtype
        rows, columns = sum(output_partition_sizes), input_size_per_partition
        value_dtype = self.checkpoint.value_dtype

        def empty(kind: str) -> Tensor:
            shape = schema.tensor_shape(kind, rows, columns, self.pattern, value_dtype)
            if kind == schema.WEIGHT_MULTIPLIER:
                shape = rows, multiplier_count(columns, input_size)
            return torch.empty(shape, dtype=schema.tensor_dtype(kind, value_dtype))

        nothing = torch.empty(0, dtype=torch.uint8)
        channels = channels_of_multiplier(columns, input_size)
        parameters: dict[str, Callable[..., CheckedParameter]] = {
            schema.WEIGHT_PACKED: SparseWeightParameter,
            schema.WEIGHT_MASK: SparseWeightParameter,
            schema.WEIGHT_SCALE: RowScaleParameter,
            schema.WEIGHT_MULTIPLIER: partial(MultiplierParameter, channels=channels),
        }
        expected: dict[str, tuple[Callable[..., Any], Tensor]] = {
            kind: (parameters[kind], empty(kind))
            for kind in (schema.WEIGHT_MASK, *schema.value_kinds(value_dtype))
        }
        if self.folded:
            folded = empty(schema.FOLDED_PERMUTATION)
            expected[schema.FOLDED_PERMUTATION] = (FoldedPermutationParameter, folded)
        if self._permutation_kind:
            copies = torch.empty((len(output_partition_sizes), columns), dtype=torch.uint8)
            expected[self._permutation_kind] = (InputPermutationParameter, copies)
        output_sizes = _checkpoint_rows(layer, output_partition_sizes, output_size)
        tensors = CheckpointLayer(self.modules, output_sizes, input_size, self.checkpoint)
        loader = extra_weight_attrs["weight_loader"]
        for kind in LOADED:
            parameter, data = expected.get(kind, (UnexpectedParameter, nothing))
            source = TensorSource(tensors, kind)
            layer.register_parameter(
                kind, parameter(data=data, source=source, weight_loader=loader)
            )
        self.bias = TensorSource(tensors, schema.BIAS)
        _watch_bias(layer, self.bias)
        self.served.created()

    def process_weights_after_loading(self, layer: Module) -> None:
        """Check what was loaded, pack it for this device, and drop the checkpoint's tensors."""
        loaded = {
            name: parameter
            for name, parameter in layer.named_parameters(recurse=False)
            if isinstance(parameter, CheckedParameter)
        }
        if not loaded:
            return  # packed before
        sources = [parameter.source for parameter in loaded.values()]
        if layer.bias is not None:
            sources.append(self.bias)
        for source in sources:
            source.require_complete()
        for source in sources:
            source.loaded.clear()  # vLLM may reload into copies that share the source
        mask = loaded[schema.WEIGHT_MASK]
        check_mask(mask.source, mask.data, self.output_sizes, self.pattern)
        numbers = [(parameter.source, parameter.data) for parameter in loaded.values()]
        if isinstance(layer.bias, Tensor):
            numbers.append((self.bias, layer.bias.data))
        check_numbers(numbers, self.output_sizes)
        permutation = loaded[self._permutation_kind].shared() if self._permutation_kind else None
        tensors = {name: parameter.data for name, parameter in loaded.items()}
        tensors[schema.WEIGHT_PACKED] = stored_values(
            tensors[schema.WEIGHT_PACKED], tensors.get(schema.WEIGHT_MULTIPLIER)
        )
        self._unfold(layer, tensors, permutation)
        values = tensors[schema.WEIGHT_PACKED]
        backend = self.served.backend(values.device, self.dtype, values.dtype)
        packed = backend.pack(
            CheckpointWeights(
                values=values,
                mask=tensors[schema.WEIGHT_MASK],
                permutation=permutation,
                scale=tensors.get(schema.WEIGHT_SCALE),
                pattern=self.pattern,
                block_size=self.checkpoint.block_size,
            )
        )
        for name in LOADED:
            delattr(layer, name)
        del loaded, tensors, values
        register_packed(layer, schema.WEIGHT_PACKED, packed.packed)
        register_packed(layer, WEIGHT_METADATA, packed.metadata)
        register_packed(layer, schema.INPUT_PERMUTATION, packed.permutation)
        register_packed(layer, schema.WEIGHT_SCALE, packed.scale)
        self.served.packed(backend, self.checkpoint, self.dtype, four_bits=packed.four_bits)

    def apply(self, layer: Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x [..., in]` times the sparse weight: `[..., out]`, in x's dtype."""
        return _sparse_linear(
            x,
            layer.weight_packed,
            packed_tensor(layer, WEIGHT_METADATA),
            packed_tensor(layer, schema.INPUT_PERMUTATION),
            packed_tensor(layer, schema.WEIGHT_SCALE),
            bias,
            self.out_features,
            self.checkpoint.pattern,
        )

    @property
    def _permutation_kind(self) -> str:
        """The tensor that is applied to the input at run time, empty where there is none."""
        if self.folded and self.unfolding is not None:
            return schema.FOLDED_PERMUTATION
        return schema.INPUT_PERMUTATION if self.permuted else ""

    def _unfold(self, layer: Any, tensors: dict[str, Tensor], permutation: Tensor | None) -> None:
        """Move the rows of `tensors` and of the bias back to where they were before folding."""
        if self.unfolding is None:
            return
        if self.folded and permutation is not None:
            self.unfolding.keep(self.prefix, permutation)
        order = self.unfolding.row_order(self.prefix, layer, self.output_sizes)
        if order is None:
            return
        for kind in (schema.WEIGHT_PACKED, schema.WEIGHT_MASK, schema.WEIGHT_SCALE):
            if kind in tensors:
                tensors[kind] = tensors[kind][order]
        if layer.bias is not None:
            layer.bias.data.copy_(layer.bias.data[order])


def _watch_bias(layer: Any, source: TensorSource) -> None:
    """Let `source` check the parts of the layer's bias, and know which are loaded.

    For `create_weights`: the layer creates its bias after that, with `layer.weight_loader`. A part
    that comes twice is not refused, because vLLM cuts a bias that is fused on disk into its parts
    and asks again for each.
    """
    layer_loader = layer.weight_loader

    def load_bias(param: Any, loaded_weight: Tensor, loaded_shard_id: ShardId = None) -> None:
        if not isinstance(param, Parameter):  # vLLM gives the layer itself for what it lacks
            raise CheckpointError(
                f"{', '.join(source.layer.modules)}: a tensor was loaded that this layer has no "
                "place for. New weights of a running model come through vLLM's own ways of "
                "reloading, such as `collective_rpc('reload_weights')`, since sparse layers are "
                "packed once they are loaded; else the checkpoint is of another model."
            )
        parts = source.layer.parts(loaded_shard_id)
        source.check(loaded_weight, parts)
        source.loaded.update(parts)
        arguments = () if loaded_shard_id is None else (loaded_shard_id,)
        layer_loader(param, loaded_weight, *arguments)

    layer.weight_loader = load_bias


def _checkpoint_rows(layer: Module, partitions: list[int], output_size: int) -> list[int]:
    """Rows that the checkpoint holds for each part of a layer, all ranks together.

    With fewer KV heads than ranks, vLLM copies a head to several ranks and counts each copy.
    """
    ranks = output_size // sum(partitions)
    copies = getattr(layer, "num_kv_head_replicas", 1)
    return [rows * ranks // (copies if part > 0 else 1) for part, rows in enumerate(partitions)]
