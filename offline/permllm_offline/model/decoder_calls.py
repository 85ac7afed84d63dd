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
    which layers leave keys and values for later ones, if there is one; ``kept`` says whether any
    layer reads them.
    """

    keywords: Mapping[str, Any]
    by_token: Mapping[str, Tensor] = field(default_factory=dict)
    handed_on: str = ""
    kept: bool = False


@dataclass(frozen=True)
class DecoderCalls:
    """The calls of one forward pass: what enters the first decoder layer, on the CPU, and each."""

    states: States
    layers: Sequence[LayerCall]


@torch.no_grad()
def record_calls(model: Any, family: Family, windows: Tensor) -> DecoderCalls:
    """Run a model over int64 [windows, sequence_length] with its decoder layers left out."""
    layers = decoder_layers(model, family.layers)
    text = _DistinctTokens.of(windows) if family.by_token else None
    recorders = [_Recorder(layer, family, text) for layer in layers]
    states: list[Tensor] = []

    def first(hidden_states: Tensor, *positional: Any, **keywords: Any) -> Any:
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
    calls = [recorder.call() for recorder in recorders]
    tokens = text.places if text is not None and any(call.by_token for call in calls) else None
    return DecoderCalls(States(torch.cat(states), tokens), calls)


@dataclass(frozen=True)
class _DistinctTokens:
    """How many there are in all windows, and which one stands where: int64, as the windows."""

    count: int
    places: Tensor

    @classmethod
    def of(cls, windows: Tensor) -> _DistinctTokens:
        distinct, places = windows.cpu().unique(return_inverse=True)
        return cls(len(distinct), places)


class _Recorder:
    """Stands in for the forward pass of a decoder layer: window after window, in order."""

    def __init__(self, layer: nn.Module, family: Family, text: _DistinctTokens | None) -> None:
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self._family, self._text = family, text
        self._window = 0
        self._keywords: dict[str, Any] = {}
        self._by_token: dict[str, Tensor] = {}

    def __call__(self, hidden_states: Tensor, *positional: Any, **keywords: Any) -> Any:
        keywords |= dict(zip(self._names, positional, strict=False))
        for name in self._family.by_token:
            if (values := keywords.pop(name, None)) is not None:
                self._add(name, values[0].cpu())
        self._keywords = keywords
        self._window += 1
        return as_given(hidden_states, self._family)

    def _add(self, name: str, values: Tensor) -> None:
        """Add an argument for the tokens of a window: [sequence_length, channels]."""
        assert self._text is not None
        if name not in self._by_token:
            self._by_token[name] = values.new_empty((self._text.count, *values.shape[1:]))
        self._by_token[name][self._text.places[self._window]] = values

    def call(self) -> LayerCall:
        """What was recorded."""
        keywords, name = dict(self._keywords), self._family.handed_on
        handed_on = "" if keywords.pop(name, None) is None else name
        return LayerCall(keywords, self._by_token, handed_on, self._family.sharing)


def hidden_of(given: Any) -> Tensor:
    """Hidden states of what a decoder layer gives: these, or a tuple that begins with them."""
    hidden: Tensor = given[0] if isinstance(given, tuple) else given
    return hidden


def as_given(hidden: Tensor, family: Family) -> Any:
    """What a decoder layer of a family gives for hidden states: undoes ``hidden_of``."""
    return (hidden,) if family.gives_tuples else hidden


def run_layer(layer: nn.Module, states: States, call: LayerCall) -> States:
    """Run one decoder layer over a batch, differentiable, on the device of both."""
    keywords = dict(call.keywords)
    for name, table in call.by_token.items():
        assert states.tokens is not None
        keywords[name] = table[states.tokens].to(states.hidden.device)
    handed_on = dict(states.handed_on)
    if call.handed_on:
        keywords[call.handed_on] = handed_on
    hidden = hidden_of(layer(states.hidden, **keywords))
    return replace(states, hidden=hidden, handed_on=handed_on if call.kept else {})


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
