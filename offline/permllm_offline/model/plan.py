"""The plan of a prune: which linears, which groups, how many bytes; made before any work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from permllm_offline.errors import OfflineError
from permllm_offline.model.families import Family, family_of, heads_of
from permllm_offline.model.layout import GroupLayout
from permllm_offline.model.loading import Source
from permllm_offline.model.modules import decoder_layers, linear_of
from permllm_vllm.checkpoint.pattern import Pattern


@dataclass(frozen=True)
class PlannedLinear:
    """One linear layer to prune and its bytes in the checkpoint, dense and sparse."""

    name: str
    layout: GroupLayout
    out_features: int
    permuted: bool
    dense_bytes: int
    sparse_bytes: int

    @property
    def weights(self) -> int:
        """How many it has."""
        return self.out_features * self.layout.in_features


@dataclass(frozen=True)
class Plan:
    """What a prune will do to a model."""

    family: Family
    layers: Sequence[Sequence[GroupLayout]]
    linears: Sequence[PlannedLinear]
    total_bytes: int
    """Bytes of the checkpoint's tensors, those left dense included."""

    def linears_by_layer(self) -> list[Sequence[PlannedLinear]]:
        """The linears of each decoder layer: all layers have equally many."""
        count = len(self.linears) // len(self.layers)
        return [self.linears[i : i + count] for i in range(0, len(self.linears), count)]


def make_plan(
    source: Source,
    pattern: Pattern,
    block_size: int | None,
    *,
    permuted: bool,
    dtype: torch.dtype,
    int8: bool = False,
) -> Plan:
    """Plan from the model's configuration alone; no weight is read.

    Args:
        source: the model.
        pattern: N and M.
        block_size: channels per permutation block, or None for one block as wide as the layer.
        permuted: whether the method permutes channels.
        dtype: of the model to be written.
        int8: whether the kept values are int8 with a scale per row, not of `dtype`.

    Raises:
        OfflineError: unsupported family, or sizes that the format cannot hold.
    """
    family, heads = family_of(source.config), heads_of(source.config)
    skeleton = _skeleton(source.config)
    layers: list[list[GroupLayout]] = []
    linears: list[PlannedLinear] = []
    for index, layer in enumerate(decoder_layers(skeleton, family.layers)):
        layers.append([])
        for group in family.groups:
            modules = [linear_of(layer, linear) for linear in group.linears]
            width = modules[0].in_features
            layout = GroupLayout(group, width, block_size or width, heads)
            layers[-1].append(layout)
            for linear, module in zip(group.linears, modules, strict=True):
                name = f"{family.layer_name(index)}.{linear}"
                _check_sizes(name, layout, permuted)
                linears.append(_plan_linear(name, layout, module, pattern, permuted, dtype, int8))
    weights = sum(linear.dense_bytes for linear in linears)
    everything = sum(p.numel() for p in skeleton.parameters()) * dtype.itemsize
    sparse = sum(linear.sparse_bytes for linear in linears)
    return Plan(family, layers, linears, everything - weights + sparse)


def _check_sizes(name: str, layout: GroupLayout, permuted: bool) -> None:
    if layout.in_features % 8:
        raise OfflineError(
            f"{name} has {layout.in_features} input channels: the format packs masks by 8 channels "
            "and needs a multiple of 8. This model cannot be pruned."
        )
    if permuted:
        layout.check_blocks(name)


def _plan_linear(
    name: str,
    layout: GroupLayout,
    module: nn.Linear,
    pattern: Pattern,
    permuted: bool,
    dtype: torch.dtype,
    int8: bool,
) -> PlannedLinear:
    count = module.weight.numel()
    sparse = count * pattern.kept // pattern.group * (1 if int8 else dtype.itemsize) + count // 8
    if int8:
        sparse += module.out_features * torch.float32.itemsize
    return PlannedLinear(
        name=name,
        layout=layout,
        out_features=module.out_features,
        permuted=permuted,
        dense_bytes=count * dtype.itemsize,
        sparse_bytes=sparse + (layout.in_features if permuted else 0),
    )


def _skeleton(config: Any) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
