"""The linear method of a layer that is left dense: vLLM's own, which takes no half of a layer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from permllm_vllm.checkpoint import schema
from permllm_vllm.compat import (
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from permllm_vllm.quantization.sources import CheckpointLayer, TensorSource

WEIGHT = "weight"


@register_weight_loader_v2_supported_method
class DenseLinearMethod(UnquantizedLinearMethod):
    """Dense weights of one (possibly fused) linear layer of a sparse model.

    vLLM asks at most whether anything of a parameter was loaded, so q would do without k. `prefix`
    is vLLM's name of the layer, `modules` those in the checkpoint.
    """

    def __init__(
        self, checkpoint: schema.QuantizationConfig, prefix: str, modules: Sequence[str]
    ) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.modules = modules

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Let vLLM register its weight, and its bias later, with loaders that are watched."""
        tensors = CheckpointLayer(self.modules, output_partition_sizes, input_size, self.checkpoint)
        self.sources = [TensorSource(tensors, WEIGHT), TensorSource(tensors, schema.BIAS)]
        weight, bias = self.sources
        extra_weight_attrs["layer_loader"] = extra_weight_attrs.pop("weight_loader")
        super().create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            weight_loader=_load_weight,
            source=weight,
            **extra_weight_attrs,
        )
        _watch_bias(layer, bias)

    def process_weights_after_loading(self, layer: Module) -> None:
        """Refuse what came in part; what did not come at all is the model loader's to notice.

        Some model classes fill a parameter past its loader, and then nothing is seen here.
        """
        for source in self.sources:
            if source.loaded:
                source.require_complete(
                    f"{self.prefix} is served as one layer, so all of its parts are needed"
                )
            source.loaded.clear()
        super().process_weights_after_loading(layer)


def _load_weight(param: Any, loaded_weight: Tensor, *arguments: Any, **keywords: Any) -> None:
    """Remember which parts came, hand everything on.

    A plain function that takes everything from `param`: vLLM's weight reloading asks for its name,
    and keeps a parameter's attributes beyond the layer, which it must not refer to otherwise.
    """
    _remember(param.source, *arguments, **keywords)
    param.layer_loader(param, loaded_weight, *arguments, **keywords)


def _watch_bias(layer: Any, source: TensorSource) -> None:
    """As for the weight; the layer creates its bias later, with `layer.weight_loader`."""
    layer_loader = layer.weight_loader

    def load_bias(param: Any, loaded_weight: Tensor, *arguments: Any, **keywords: Any) -> None:
        _remember(source, *arguments, **keywords)
        layer_loader(param, loaded_weight, *arguments, **keywords)

    layer.weight_loader = load_bias


def _remember(source: TensorSource, *arguments: Any, **keywords: Any) -> None:
    (shard_id, *_) = (*arguments, *keywords.values(), None)
    source.loaded.update(source.layer.parts(shard_id))
