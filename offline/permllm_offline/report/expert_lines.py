"""The experts of a decoder layer as one line of a table for each kind of linear."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from permllm_offline.report.report import LayerReport


def without_expert(name: str) -> str:
    """Write * for the number of an expert: ``model.layers.0.mlp.experts.*.up_proj``."""
    parts = name.split(".")
    numbers = [at for at, part in enumerate(parts) if part.isdecimal()]
    for at in numbers[1:]:
        parts[at] = "*"
    return ".".join(parts)


def with_count(name: str, count: int) -> str:
    """Name of a line that stands for some linears, with their number where it is more than one."""
    return name if count == 1 else f"{name} ({count})"


def joined_experts(layers: Sequence[LayerReport]) -> list[LayerReport]:
    """Join linears that differ in the number of their expert alone.

    Bytes are sums, shares means, and the error of int8 values is the largest.
    """
    alike: dict[tuple[str, int, int, str], list[LayerReport]] = {}
    for layer in layers:
        key = without_expert(layer.name), layer.out_features, layer.in_features, layer.permutation
        alike.setdefault(key, []).append(layer)
    return [_joined(name, found) for (name, *_), found in alike.items()]


def _joined(name: str, layers: Sequence[LayerReport]) -> LayerReport:
    errors = [layer.rounding_error for layer in layers if layer.rounding_error is not None]
    return replace(
        layers[0],
        name=with_count(name, len(layers)),
        moved_channels=sum(layer.moved_channels for layer in layers) / len(layers),
        retained_importance=sum(layer.retained_importance for layer in layers) / len(layers),
        dense_bytes=sum(layer.dense_bytes for layer in layers),
        sparse_bytes=sum(layer.sparse_bytes for layer in layers),
        rounding_error=max(errors, default=None),
    )
