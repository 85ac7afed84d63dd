"""The kept weights of a decoder layer on the grids of int8 or int4 values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from permllm_offline.model.modules import linear_of
from permllm_offline.sparsity.decisions import LayerDecision
from permllm_offline.sparsity.grid import Grid, relative_error
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.int4_values import Int4Grid, choose_grid
from permllm_offline.sparsity.int8_values import Int8Grid, choose_scale

Rounding = Literal["int8", "int4"]


@dataclass(frozen=True)
class RoundedLayer:
    """Float32 [out] scales of a decoder layer's linears, and what each loses by rounding.

    ``errors`` are the expected root-mean-square errors of the output, relative to the output.
    ``int4`` has the grids where values are int4. All tensors are on the CPU.
    """

    scales: Mapping[str, Tensor]
    errors: Mapping[str, float]
    int4: Mapping[str, Int4Grid] = field(default_factory=dict)

    def grid(self, linear: str) -> Grid:
        """The grid of a linear."""
        return self.int4.get(linear) or Int8Grid(self.scales[linear])


def choose_grids(
    layer: nn.Module,
    decision: LayerDecision,
    energies: Mapping[str, Tensor] | None,
    values: Rounding,
    *,
    rounds: bool,
) -> RoundedLayer:
    """Choose grids for the masked weights of a decoder layer.

    Args:
        layer: decoder layer whose pruned weights are zero.
        decision: names its pruned linears.
        energies: shared-input group -> float32 [in_features], or None without calibration.
        values: which grids.
        rounds: move the weights onto them, in place. They keep their dtype: the integer times the
            scale, rounded to it, from which the grid finds the same integer again
            (bfloat16 moves the quotient by at most 128 / 512), but where a row is of subnormal
            numbers.
    """
    scales: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    int4: dict[str, Int4Grid] = {}
    for group in decision:
        for linear in group.masks:
            weight = linear_of(layer, linear).weight.data
            energy = torch.ones(weight.shape[1], device=weight.device)
            if energies is not None:
                energy = energies[group.layout.group.name].to(weight.device)
            grid: Grid
            if values == "int4":
                grid = chosen = choose_grid(weight, energy)
                int4[linear] = Int4Grid(chosen.scale.cpu(), chosen.multipliers.cpu())
            else:
                grid = Int8Grid(choose_scale(weight, energy))
            errors[linear] = relative_error(weight, energy, grid)
            scales[linear] = grid.scale.cpu()
            for rows in row_chunks(weight.shape) if rounds else ():
                weight[rows] = grid.rounded(weight[rows], rows=rows).to(weight.dtype)
    return RoundedLayer(scales, errors, int4)
