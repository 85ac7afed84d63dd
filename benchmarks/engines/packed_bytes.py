"""Bytes of what the plugin has packed in a model, asked of the worker process that holds it."""

from typing import Any

import torch


def sparse_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a model's sparse linear layers: as the backend packed them, and as bfloat16."""
    from permllm_vllm.quantization.experts import PermLLMExpertsMethod
    from permllm_vllm.quantization.linear import PermLLMLinearMethod

    packed = dense = 0
    layer: Any
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, PermLLMLinearMethod):
            weights = layer.input_size * layer.output_size
        elif isinstance(method, PermLLMExpertsMethod):
            weights = 3 * layer.hidden_size * layer.intermediate_size_per_partition
            weights *= layer.local_num_experts
        else:
            continue
        parts = layer.named_parameters(recurse=False)
        packed += sum(part.nbytes for name, part in parts if name != "bias")
        dense += 2 * weights
    return packed, dense


def head_bytes(model: torch.nn.Module) -> tuple[int, int]:
    """Bytes of a model's output head that has a packed copy: of the copy, and as bfloat16."""
    from permllm_vllm.quantization.head import COPY

    layer: Any
    for layer in model.modules():
        if (copy := layer.__dict__.get(COPY)) is not None:
            return copy.packed.nbytes, layer.weight.nbytes
    return 0, 0
