"""A model whose weights lie in the checkpoint and come into memory when they are at work."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from permllm_offline.errors import OfflineError
from permllm_offline.model.family import Family
from permllm_offline.model.loading import Source, model_from
from permllm_offline.model.modules import decoder_layers, load_tensor
from permllm_offline.model.plain_tensors import PlainTensors
from permllm_offline.model.skeleton import skeleton_of
from permllm_offline.text.evaluation import perplexity


class StreamedModel:
    """A causal language model whose parameters have memory only inside a context.

    Inside ``resident`` a decoder layer has its weights, inside ``embedding`` and ``head`` the model
    has what comes before the decoder layers and after them. Buffers that follow from the
    configuration (rotary frequencies, scales of embeddings) stay. ``tensors`` are those of the
    checkpoint, seen as a plain one where it is another.

    Raises:
        OfflineError, CheckpointError: a checkpoint that cannot be loaded.
    """

    def __init__(
        self,
        source: Source,
        family: Family,
        dtype: torch.dtype,
        device: torch.device,
        tensors: PlainTensors | None = None,
    ) -> None:
        self.family, self.device = family, device
        self._reader = tensors or source.reader()
        self.model, self._stored = _without_weights(source, self._reader, family, dtype, device)
        self.model.requires_grad_(False)
        self.layers = decoder_layers(self.model, family.layers)

    @contextmanager
    def resident(self, index: int) -> Iterator[nn.Module]:
        """Load the dense weights of a decoder layer for the length of the context."""
        layer = self.layers[index]
        layer.to_empty(device=self.device)
        own = list(layer.state_dict())  # names alone: tensors would stay when others replace them
        if any(name not in own for name, _ in layer.named_buffers()):
            # Not stored: these follow from the configuration, as Transformers sets them.
            self.model.base_model._init_weights(self.model.base_model)
        try:
            for name in own:  # one by one: read all at once, they are a second layer
                stored = self.family.stored_name(index, name)
                load_tensor(layer, name, self._reader.tensor(stored))
            yield layer
        finally:
            layer.to("meta")

    @contextmanager
    def embedding(self) -> Iterator[None]:
        """Load what is outside the decoder layers, without the head, while text is embedded."""
        absent = [self.model.get_output_embeddings()]
        with self._outside(absent, self.model.get_input_embeddings()):
            yield

    @contextmanager
    def head(self) -> Iterator[None]:
        """Load what is outside the decoder layers, without the embeddings: these give zeros."""
        absent = [self.model.get_input_embeddings()]
        with self._outside(absent, self.model.get_output_embeddings()):
            yield

    @contextmanager
    def _outside(self, absent: Sequence[nn.Module], present: nn.Module) -> Iterator[None]:
        """Load all parameters outside but those of some modules that another does not share."""
        shared = {id(parameter) for parameter in present.parameters()}
        left = {id(one) for module in absent for one in module.parameters()} - shared
        loaded = [
            (parameter, name)
            for parameter, name in self._stored.values()
            if id(parameter) not in left
        ]
        try:
            for parameter, name in loaded:
                parameter.data = self._reader.tensor(name).to(parameter.dtype).to(self.device)
            yield
        finally:
            for parameter, _ in loaded:
                parameter.data = _placeholder(parameter.shape, parameter.dtype, self.device)

    def perplexity(self, windows: Tensor, states: Tensor, description: str) -> float:
        """Perplexity from what the last decoder layer gave.

        Args:
            windows: int64 [windows, sequence_length].
            states: [windows, sequence_length, hidden], after the last decoder layer.
            description: label of the progress bar.
        """
        pending = iter(states)

        def skip(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return hidden_states

        def answer(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return next(pending)[None].to(self.device)

        try:
            for layer in self.layers:
                layer.forward = skip
            self.layers[-1].forward = answer
            with self.head():
                return perplexity(self.model, windows, description)
        finally:
            for layer in self.layers:
                layer.__dict__.pop("forward", None)


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of any shape in the memory of one."""
    return torch.zeros((), dtype=dtype, device=device).expand(shape)


@contextmanager
def _without_elements() -> Iterator[None]:
    """Where a model is built without layers, what is sized by them has no elements: on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        yield


def _memory(tensor: Tensor) -> int:
    """Where the memory of a tensor begins; also of one without elements, which has no address."""
    return tensor.untyped_storage().data_ptr()


def _without_weights(
    source: Source,
    reader: PlainTensors,
    family: Family,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Any, Mapping[str, tuple[nn.Parameter, str]]]:
    """Build a model without the memory of its parameters.

    Its decoder layers are on the meta device, the other parameters placeholders.

    Returns:
        The model, and parameters outside the decoder layers by name, each with that of its stored
        tensor.
    """
    from permllm_vllm.hf.precision import kept_in_float32

    config = deepcopy(source.config)
    config.num_hidden_layers = 0
    skeleton = skeleton_of(source.config, dtype)
    placeholders: dict[str, Tensor] = {}
    for name in reader.names():
        own = source.language.names.own(name)
        if own is not None and not own.startswith(f"{family.layers}."):
            shape = torch.Size(reader.header(name).shape)
            held = torch.float32 if kept_in_float32(skeleton, own, dtype) else dtype
            placeholders[own] = _placeholder(shape, held, torch.device("cpu"))
    with _without_elements():
        model, _ = model_from(source, config, placeholders.items(), dtype)
    # Transformers may call a parameter otherwise than its tensor: they are told by their memory.
    names = {
        _memory(tensor): source.language.names.stored(own) for own, tensor in placeholders.items()
    }
    stored = {}
    for name, parameter in model.named_parameters():
        if _memory(parameter) not in names:
            raise OfflineError(
                f"{source.name!r} stores {name} in another form than it is loaded in, so it cannot "
                "be read layer by layer. Load it with transformers, `save_pretrained` it, and "
                "prune that."
            )
        tensor = names[_memory(parameter)]
        stored[name] = (parameter, tensor)
        shape = torch.Size(reader.header(tensor).shape)
        parameter.data = _placeholder(shape, parameter.dtype, device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    model.config.num_hidden_layers = source.config.num_hidden_layers
    if not model.config.num_hidden_layers:
        model.config.layer_types = source.config.layer_types
    model.set_submodule(family.layers, skeleton.get_submodule(family.layers))
    return model.eval(), stored
