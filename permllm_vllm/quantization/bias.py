"""Notices a missing bias: vLLM creates it beside the quantized weight and never asks for it."""

from typing import Any

from torch import Tensor
from torch.nn import Parameter

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.quantization.sources import ShardId, TensorSource


def watch_bias(layer: Any, source: TensorSource) -> None:
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
