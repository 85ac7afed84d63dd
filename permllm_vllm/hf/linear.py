"""A linear layer that holds the checkpoint's tensors and multiplies with the packed ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from permllm_vllm import ops
from permllm_vllm.backends import (
    Backend,
    CheckpointWeights,
    PackedWeights,
    require_pattern,
    select_backend,
)
from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.errors import Problem, raise_if_any
from permllm_vllm.checkpoint.int4 import stored_values
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.pattern import Pattern


class Backends:
    """The backends of one model: chosen once, so that a fallback is warned about once."""

    def __init__(self) -> None:
        self._chosen: dict[tuple[torch.device, torch.dtype, torch.dtype], Backend] = {}

    def __call__(self, device: torch.device, dtype: torch.dtype, values: torch.dtype) -> Backend:
        """Return what packs and multiplies for activations of `dtype` on this device."""
        key = (device, dtype, values)
        if key not in self._chosen:
            self._chosen[key] = select_backend(*key)
        return self._chosen[key]


class _Packed(NamedTuple):
    device: torch.device
    dtype: torch.dtype
    weights: PackedWeights


class _InferenceOnly(torch.autograd.Function):
    """Gives an output that no gradient comes back through: left out, it would pass unnoticed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, name: str) -> Tensor:
        ctx.name = name
        ctx.mark_dirty(output)  # returned as it is, so that it may be changed in place
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{ctx.name} is a sparse layer for inference and has no gradient: call "
            "model.dequantize() before training"
        )


class SparseLinear(nn.Module):
    """An N:M sparse linear layer `[out, in]`, for inference.

    Its buffers are the checkpoint's tensors, in their own dtypes whatever the model is converted
    to, so that saving writes the bytes that were read; `bias` is a parameter in the model's dtype.
    The first call with activations of a device and dtype packs the weight for them; the packed
    weight is kept beside the buffers and never saved.

    Args:
        in_features, out_features: sizes of the dense layer.
        bias: whether there is one.
        checkpoint: the checkpoint's description of its sparse layers.
        name: full module name, as that description lists it.
        backends: shared by the layers of a model.
        dtype: of the bias.
        device: of all tensors until they are loaded.
    """

    weight_packed: Tensor
    weight_mask: Tensor
    input_permutation: Tensor | None
    folded_permutation: Tensor | None
    weight_scale: Tensor | None
    weight_multiplier: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        checkpoint: schema.QuantizationConfig,
        name: str,
        backends: Backends,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.name = name
        self.pattern = Pattern.parse(checkpoint.pattern)
        self.block_size = checkpoint.block_size
        self._backends = backends
        values = checkpoint.value_dtype
        self._value_dtype = schema.computed_dtype(values)
        self._packed: _Packed | None = None
        present = {
            schema.WEIGHT_MASK: True,
            schema.INPUT_PERMUTATION: checkpoint.lists("runtime_permuted", name),
            schema.FOLDED_PERMUTATION: checkpoint.lists("folded", name),
        } | dict.fromkeys(schema.value_kinds(values), True)
        for kind in schema.SPARSE_KINDS:
            tensor = None
            if present.get(kind):
                shape = schema.tensor_shape(kind, out_features, in_features, self.pattern, values)
                kind_dtype = schema.tensor_dtype(kind, values)
                tensor = torch.empty(shape, dtype=kind_dtype, device=device)
            self.register_buffer(kind, tensor)
        self.bias: nn.Parameter | None = None
        if bias:
            empty = torch.empty(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(empty, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply activations `[..., in]`, in the original channel order, to `[..., out]`.

        Raises:
            RuntimeError: activations of another width, or a pattern that the device cannot serve.
        """
        if x.shape[-1] != self.in_features:
            raise RuntimeError(
                f"{self.name} got activations of {x.shape[-1]} channels; it multiplies "
                f"{self.in_features}"
            )
        output = self._multiply(x.detach())
        if torch.is_grad_enabled() and x.requires_grad:
            result: Tensor = _InferenceOnly.apply(x, output, self.name)
            return result
        return output

    def _multiply(self, x: Tensor) -> Tensor:
        packed = self._packed_for(x.device, x.dtype)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return ops.sparse_linear(
            x,
            packed.packed,
            packed.metadata,
            packed.permutation,
            packed.scale,
            bias,
            self.out_features,
            str(self.pattern),
        )

    def stored(self) -> SparseLayer:
        """Return the layer as a checkpoint holds it."""
        return self._with_values(stored_values(self.weight_packed, self.weight_multiplier))

    def _with_values(self, values: Tensor) -> SparseLayer:
        return SparseLayer(
            values=values,
            mask=self.weight_mask,
            input_permutation=self.input_permutation,
            folded_permutation=self.folded_permutation,
            scale=self.weight_scale,
            bias=self.bias,
            name=self.name,
            multipliers=self.weight_multiplier,
        )

    def content_problems(self) -> list[Problem]:
        """List every rule of the format that the contents break; none while they are on disk."""
        layer = self._with_values(self.weight_packed)  # of int4, whose bytes break no rule
        if layer.values.is_meta:
            return []
        if layer.bias is not None and layer.bias.is_meta:
            layer = replace(layer, bias=None)
        return layer.content_problems(self.pattern, self.block_size)

    def dense(self, dtype: torch.dtype) -> nn.Linear:
        """Return the dense layer of the same function; raises `CheckpointError` on bad contents."""
        weight = self.stored().dense(self.pattern, self.block_size).to(dtype)
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta"
        )
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype))
        return linear

    def extra_repr(self) -> str:
        """Sizes, pattern, and what multiplies once that is known."""
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        text += f", bias={self.bias is not None}, pattern={self.pattern}"
        if self._packed is not None:
            text += f", backend={self._backend(self._packed.device, self._packed.dtype).name}"
        return text

    def _packed_for(self, device: torch.device, dtype: torch.dtype) -> PackedWeights:
        packed = self._packed
        if packed is None or packed.device != device or packed.dtype != dtype:
            packed = self._packed = _Packed(device, dtype, self._pack(device, dtype))
        return packed.weights

    def _pack(self, device: torch.device, dtype: torch.dtype) -> PackedWeights:
        require_pattern(device, self.pattern)
        raise_if_any(self.content_problems())
        return self._backend(device, dtype).pack(
            CheckpointWeights(
                values=self.stored().values,
                mask=self.weight_mask,
                permutation=self.input_permutation,
                scale=self.weight_scale,
                pattern=self.pattern,
                block_size=self.block_size,
            )
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Move with the model, but keep the dtypes of the format (`model.to(torch.float32)`)."""
        dtypes = {kind: buffer.dtype for kind, buffer in self.named_buffers(recurse=False)}
        originals = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for kind, dtype in dtypes.items():
            moved = getattr(self, kind)
            if moved.dtype != dtype:
                setattr(self, kind, originals[kind].to(moved.device))
        self._packed = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._packed = None

    def _backend(self, device: torch.device, dtype: torch.dtype) -> Backend:
        return self._backends(device, dtype, self._value_dtype)
