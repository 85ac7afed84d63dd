"""Grids of decoder layers as tensors with names, for a file of a finished step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from permllm_offline.sparsity.rounded_layer import RoundedLayer

_SCALE = "scale:"
_MULTIPLIERS = "multipliers:"
_EXPONENTS = "exponents:"


def grid_tensors(layers: Sequence[RoundedLayer]) -> dict[str, Tensor]:
    """The tensors of all layers; their errors are no part of them."""
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(layers):
        kinds = {_SCALE: layer.scales, _MULTIPLIERS: layer.multipliers, _EXPONENTS: layer.exponents}
        for kind, named in kinds.items():
            tensors |= {f"{kind}{index}:{name}": tensor for name, tensor in named.items()}
    return tensors


def grids_of(
    tensors: Mapping[str, Tensor], errors: Sequence[Mapping[str, float]]
) -> list[RoundedLayer]:
    """Undo ``grid_tensors``; other tensors may be among them.

    Args:
        tensors: with the names that it gave.
        errors: of each layer.
    """
    kinds = _SCALE, _MULTIPLIERS, _EXPONENTS
    scales, multipliers, exponents = (_by_layer(tensors, kind, len(errors)) for kind in kinds)
    return [
        RoundedLayer(scales[index], own, multipliers[index], exponents[index])
        for index, own in enumerate(errors)
    ]


def _by_layer(tensors: Mapping[str, Tensor], prefix: str, count: int) -> list[dict[str, Tensor]]:
    """The tensors whose names begin so: of each decoder layer, by the rest of their names."""
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for name in tensors:
        if name.startswith(prefix):
            index, _, rest = name.removeprefix(prefix).partition(":")
            found[int(index)][rest] = tensors[name]
    return found
