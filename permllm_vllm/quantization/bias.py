"""Notices a missing bias: vLLM creates it beside the quantized weight and never asks for it."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from permllm_vllm.quantization.sources import ShardId, TensorSource


def watch_bias(layer: Any, source: TensorSource) -> None:
    """Let `source` know which parts of the layer's bias are loaded.

    For `create_weights`: the layer creates its bias after that, with `layer.weight_loader`.
    """
    layer.weight_loader = _BiasLoader(source, layer.weight_loader)


class _BiasLoader:
    """Check the tensor, remember it, hand it on.

    A part that comes twice is not refused, because vLLM cuts a bias that is fused on disk into its
    parts and asks again for each.
    """

    def __init__(self, source: TensorSource, layer_loader: Callable[..., None]) -> None:
        self._source = source
        self._layer_loader = layer_loader

    def __call__(
        self, param: Parameter, loaded_weight: Tensor, loaded_shard_id: ShardId = None
    ) -> None:
        parts = self._source.layer.parts(loaded_shard_id)
        self._source.check(loaded_weight, parts)
        self._source.loaded.update(parts)
        arguments = () if loaded_shard_id is None else (loaded_shard_id,)
        self._layer_loader(param, loaded_weight, *arguments)
