"""A model whose decoder layers lie in the checkpoint and come into memory one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from permllm_offline.model.families import Family
from permllm_offline.model.loading import Source, model_from
from permllm_offline.model.modules import decoder_layers
from permllm_offline.text.evaluation import perplexity
from permllm_vllm.checkpoint.reader import CheckpointReader


class StreamedModel:
    """A causal language model whose decoder layers have no memory except inside ``resident``.

    Raises:
        OfflineError, CheckpointError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self, source: Source, family: Family, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.family, self.device = family, device
        self._reader = CheckpointReader(source.directory)
        self.model = _with_empty_layers(source, self._reader, family, dtype, device)
        self.model.requires_grad_(False)
        self.layers = decoder_layers(self.model, family.layers)

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Load the dense weights of a decoder layer for the length of the context."""
        layer, prefix = self.layers[index], f"{self.family.layer_name(index)}."
        layer.to_empty(device=self.device)
        try:
            for name in layer.state_dict():  # one by one: read all at once, they are a second layer
                layer.load_state_dict({name: self._reader.tensor(prefix + name)}, strict=False)
            yield layer
        finally:
            layer.to("meta")

    def perplexity(self, windows: Tensor, states: Tensor, description: str) -> float:
        """Perplexity from what the last decoder layer gave.

        Args:
            windows: int64 [windows, sequence_length].
            states: [windows, sequence_length, hidden], after the last decoder layer.
            description: label of the progress bar.
        """
        pending = iter(states)

        def skip(hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states

        def answer(hidden_states: Tensor, **_: Any) -> Tensor:
            return next(pending)[None].to(self.device)

        try:
            for layer in self.layers:
                layer.forward = skip
            self.layers[-1].forward = answer
            return perplexity(self.model, windows, description)
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)


def _with_empty_layers(
    source: Source,
    reader: CheckpointReader,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Load everything but the decoder layers, which are on the meta device."""
    from transformers import AutoModelForCausalLM

    config = deepcopy(source.config)
    config.num_hidden_layers = 0
    model, _ = model_from(source, config, _outside(reader, family, dtype), dtype)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(
            deepcopy(source.config), dtype=dtype, trust_remote_code=False
        )
    model.to(device).eval()
    model.config.num_hidden_layers = source.config.num_hidden_layers
    model.set_submodule(family.layers, skeleton.get_submodule(family.layers).eval())
    return model


def _outside(
    reader: CheckpointReader, family: Family, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    """Read the tensors that belong to no decoder layer."""
    for name in reader.names():
        if not name.startswith(f"{family.layers}."):
            tensor = reader.tensor(name)
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
