"""What a model passes to its decoder layers, so that they can be run one at a time."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from permllm_offline.model.family import Family
from permllm_offline.model.modules import decoder_layers
from permllm_offline.model.states import HIDDEN, States


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a decoder layer's call beside its hidden states.

    ``keywords`` (rotary embeddings, attention mask) are those for one window; windows of equal
    length without padding share them, and they broadcast over a batch. ``by_token`` are those that
    follow from each token, [distinct tokens, channels]. ``handed_on`` names the dictionary in
    which layers leave keys and values for later ones, if there is one.
    """

    keywords: Mapping[str, Any]
    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    handed_on: str = ""


@dataclass(frozen=True)
class DecoderCalls:
    """The calls of one forward pass: what enters the first decoder layer, on the CPU, and each."""

    states: States
    layers: Sequence[LayerCall]


@torch.no_grad()
def record_calls(model: Any, family: Family, windows: Tensor) -> DecoderCalls:
    """Run a model over int64 [windows, sequence_length] with its decoder layers left out."""
    layers = decoder_layers(model, family.layers)
    recorders = [_Recorder(layer, family, windows) for layer in layers]
    try:
        for layer, recorder in zip(layers, recorders, strict=True):
            layer.forward = recorder
        for window in windows:
            model.base_model(window[None].to(model.device), use_cache=False)
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
    calls = [recorder.call() for recorder in recorders]
    tokens = recorders[0].tokens if any(call.by_token for call in calls) else None
    return DecoderCalls(States(torch.cat(recorders[0].states), tokens), calls)


class _Recorder:
    """Stands in for the forward pass of a decoder layer: window after window, in order."""

    def __init__(self, layer: nn.Module, family: Family, windows: Tensor) -> None:
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self._family = family
        distinct, self.tokens = windows.cpu().unique(return_inverse=True)
        self._distinct = len(distinct)
        self.states: list[Tensor] = []
        self._keywords: dict[str, Any] = {}
        self._by_token: dict[str, Tensor] = {}

    def __call__(self, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Tensor:
        keywords |= dict(zip(self._names, positional, strict=False))
        tokens = self.tokens[len(self.states)]
        self.states.append(hidden_states.cpu())
        for name in self._family.by_token:
            if (values := keywords.pop(name, None)) is not None:
                if name not in self._by_token:
                    shape = (self._distinct, *values.shape[2:])
                    self._by_token[name] = values.new_empty(shape, device="cpu")
                self._by_token[name][tokens] = values[0].cpu()
        self._keywords = keywords
        return hidden_states

    def call(self) -> LayerCall:
        """What was recorded."""
        keywords, name = dict(self._keywords), self._family.handed_on
        handed_on = "" if keywords.pop(name, None) is None else name
        return LayerCall(keywords, self._by_token, handed_on)


def run_layer(layer: nn.Module, states: States, call: LayerCall) -> States:
    """Run one decoder layer over a batch, differentiable, on the device of both."""
    keywords = dict(call.keywords)
    for name, table in call.by_token.items():
        assert states.tokens is not None
        keywords[name] = table[states.tokens.to(table.device)].to(states.hidden.device)
    handed_on = dict(states.handed_on)
    if call.handed_on:
        keywords[call.handed_on] = handed_on
    hidden: Tensor = layer(states.hidden, **keywords)
    return replace(states, hidden=hidden, handed_on=handed_on)


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
    before = {name: tensor for name, tensor in states.tensors().items() if name != HIDDEN}
    found: dict[str, Tensor] = {}
    for index, window in enumerate(states.one_by_one()):
        for name, tensor in run_layer(layer, window.to(device), call).tensors().items():
            if name in before:
                continue
            if name not in found:
                shape = (len(states), *tensor.shape[1:])
                found[name] = tensor.new_empty(shape, device="cpu")
            found[name][index] = tensor[0]
    return states.with_tensors(before | found)
