"""What a model passes to its decoder layers, so that they can be run one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permllm_offline.model.families import Family
from permllm_offline.model.modules import decoder_layers


@dataclass(frozen=True)
class DecoderCalls:
    """The calls of one forward pass.

    ``states`` is [windows, sequence_length, hidden], the input of the first decoder layer, on the
    CPU. ``keywords[layer]`` are the other arguments (rotary embeddings, attention mask), for one
    window; windows of equal length without padding share them, and they broadcast over a batch.
    """

    states: Tensor
    keywords: Sequence[Mapping[str, Any]]


@torch.no_grad()
def record_calls(model: Any, family: Family, windows: Tensor) -> DecoderCalls:
    """Run a model over int64 [windows, sequence_length] with its decoder layers left out."""
    layers = decoder_layers(model, family.layers)
    keywords: list[Mapping[str, Any]] = [{} for _ in layers]
    states: list[Tensor] = []

    def skip(index: int) -> Any:
        def forward(hidden_states: Tensor, **arguments: Any) -> Tensor:
            keywords[index] = arguments
            if index == 0:
                states.append(hidden_states.cpu())
            return hidden_states

        return forward

    try:
        for index, layer in enumerate(layers):
            layer.forward = skip(index)
        for window in windows:
            model.base_model(window[None].to(model.device), use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    return DecoderCalls(torch.cat(states), keywords)


def run_layer(layer: nn.Module, states: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer: [batch, sequence_length, hidden] -> the same, differentiable."""
    output: Tensor = layer(states, **keywords)
    return output


@torch.no_grad()
def run_windows(layer: nn.Module, states: Tensor, keywords: Mapping[str, Any]) -> Tensor:
    """Run one decoder layer over all windows, one at a time, without gradients.

    Args:
        layer: the decoder layer, on any device.
        states: [windows, sequence_length, hidden] on the CPU.
        keywords: of the layer's call.

    Returns:
        [windows, sequence_length, hidden] on the CPU.
    """
    device = next(layer.parameters()).device
    output = torch.empty_like(states)
    for index, window in enumerate(states):
        output[index] = run_layer(layer, window[None].to(device), keywords)[0]
    return output
