"""Typed look-ups of modules by name."""

from __future__ import annotations

from typing import cast

from torch import nn


def linear_of(layer: nn.Module, name: str) -> nn.Linear:
    """Return the linear ``name`` of a decoder layer."""
    return cast(nn.Linear, layer.get_submodule(name))


def has_linear(layer: nn.Module, name: str) -> bool:
    """Whether a decoder layer has a linear ``name``."""
    return name in dict(layer.named_modules())


def decoder_layers(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the decoder layers, which the model holds under ``name``."""
    return list(model.get_submodule(name).children())
