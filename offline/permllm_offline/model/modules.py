"""Typed look-ups of modules by name."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """Return the linear ``name`` of a decoder layer."""
    return cast(nn.Linear, layer.get_submodule(name))


def has_module(parent: nn.Module, name: str) -> bool:
    """Whether a model or a decoder layer has a module ``name``."""
    try:
        parent.get_submodule(name)
    except AttributeError:
        return False
    return True


def decoder_layers(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the decoder layers, which the model holds under ``name``."""
    return list(model.get_submodule(name).children())


def load_tensor(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Copy a tensor into the parameter or buffer ``name`` of a layer; raises where sizes differ."""
    module, _, kind = name.rpartition(".")
    # Of its own module alone: a layer of many experts would look at all of them for each tensor.
    layer.get_submodule(module).load_state_dict({kind: tensor}, strict=False)
