"""What a model passes to its decoder layers, so that they can be run one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from permllm_offline.model.family import Family
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.states import States


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer's call beside its hidden states.

    ``keywords`` (rotary embeddings, attention mask) are those for one window; windows of equal
    length without padding share them, and they broadcast over a batch.
    """

    keywords: Mapping[str, Any]


@dataclass(frozen=True)
class DecoderCalls:
    """The calls of one forward pass: what enters the first decoder layer, on the CPU, and each."""

    states: States
    layers: Sequence[LayerCall]


@torch.no_grad()
def record_calls(model: Any, family: Family, windows: Tensor) -> DecoderCalls:
    """Run a model over int64 [windows, sequence_length] with its decoder layers left out."""
    layers = decoder_layers(model, family.layers)
    recorders = [_Recorder(layer) for layer in layers]
    states: list[Tensor] = []

    def first(hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
        states.append(hidden_states.cpu())
        return recorders[0](hidden_states, *positional, **keywords)

    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            layer.forward = recorder
        layers[0].forward = first
        for window in windows:
            model.base_model(window[None].to(model.device), use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    calls = [LayerCall(recorder.keywords) for recorder in recorders]
    return DecoderCalls(States(torch.cat(states)), calls)


class _Recorder:
    """Stands in for the forward pass of a decoder layer, and keeps what it was given last."""

    def __init__(self, layer: nn.Module) -> None:
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self.keywords: dict[str, Any] = {}

    def __call__(self, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
        self.keywords = keywords | dict(zip(self._names, positional, strict=False))
        return hidden_states


def run_layer(layer: nn.Module, states: States, call: LayerCall) -> States:
    """Run one decoder layer over a batch, differentiable, on the device of both."""
    return States(layer(states.hidden, **call.keywords))


@torch.no_grad()
def run_windows(layer: nn.Module, states: States, call: LayerCall) -> States:
    """Run one decoder layer over all windows, one at a time, without gradients.

    Args:
        layer: the decoder layer, on any device.
        states: of the windows, on the CPU.
        call: of the layer.

    Returns:
        What it gives, on the CPU.
    """
    device = next(layer.parameters()).device
    found = torch.empty_like(states.hidden)
    for index, window in enumerate(states.one_by_one()):
        found[index] = run_layer(layer, window.to(device), call).hidden[0]
    return States(found)
