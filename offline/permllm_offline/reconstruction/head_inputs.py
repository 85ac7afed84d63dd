"""What the head of a language model reads: the last hidden state after the final norm."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from permllm_offline.model.family import Family
from permllm_offline.model.modules import decoder_layers


def head_input(model: Any, window: Tensor) -> Tensor:
    """Run a model over int64 [sequence_length]: [sequence_length, width], differentiable.

    The width is that of the head, which OPT's ``project_out`` makes another than the layers'.
    """
    output = model.base_model(window[None].to(model.device), use_cache=False)
    state: Tensor = output.last_hidden_state[0]
    return state


@torch.no_grad()
def head_inputs_of(model: Any, family: Family, states: Tensor) -> Tensor:
    """Compute what the head reads from the states after the last decoder layer.

    Whatever the architecture does between the two is done by its own code: the model runs with
    decoder layers that return the given state.

    Args:
        model: causal language model of transformers.
        family: names of its modules.
        states: [windows, sequence_length, hidden].

    Returns:
        [windows, sequence_length, width] on the CPU, as ``head_input`` gives it.
    """
    width = model.get_output_embeddings().weight.shape[1]
    found = states.new_empty((*states.shape[:2], width))
    for index, state in enumerate(states):
        window = torch.zeros(len(state), dtype=torch.long)
        with _layers_return(model, family, state.to(model.device)):
            found[index] = head_input(model, window).cpu()
    return found


@contextmanager
def _layers_return(model: Any, family: Family, state: Tensor) -> Iterator[None]:
    def forward(*arguments: Any, **keywords: Any) -> Tensor:
        return state[None]

    layers = decoder_layers(model, family.layers)
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
