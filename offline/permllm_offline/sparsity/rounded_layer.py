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
from permllm_offline.sparsity.smoothing import choose_exponents, multiplied

Rounding = Literal["int8", "int4"]


@dataclass(frozen=True)
class RoundedLayer:
    """Float32 [out] scales of a decoder layer's linears, and what each loses by rounding.

    ``errors`` are the expected root-mean-square errors of the output, relative to the output.
    ``multipliers`` are those of int4 values, linear -> uint8 [out, groups], and ``exponents`` those
    of smoothed inputs, shared-input group -> int8 [in]. All tensors are on the CPU.
    """

    scales: Mapping[str, Tensor]
    errors: Mapping[str, float]
    multipliers: Mapping[str, Tensor] = field(default_factory=dict)
    exponents: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def smoothed(self) -> bool:
        """Whether any input is divided by another number than 1."""
        return any(bool(one.any()) for one in self.exponents.values())

    def grid(self, group: str, linear: str) -> Grid:
        """The grid of a linear of a shared-input group."""
        if self.multipliers:
            return self.int4_grid(group, linear)
        return Int8Grid(self.scales[linear], self.exponents.get(group))

    def int4_grid(self, group: str, linear: str) -> Int4Grid:
        """The same where the values are int4."""
        scale, multipliers = self.scales[linear], self.multipliers[linear]
        return Int4Grid(scale, multipliers, exponents=self.exponents.get(group))


def choose_grids(
    layer: nn.Module,
    decision: LayerDecision,
    energies: Mapping[str, Tensor] | None,
    values: Rounding,
    *,
    rounds: bool,
    smooths: bool = False,
) -> RoundedLayer:
    """Choose grids for the masked weights of a decoder layer, in its own channel magnitudes.

    Args:
        layer: decoder layer whose pruned weights are zero.
        decision: names its pruned linears.
        energies: shared-input group -> float32 [in_features], or None without calibration.
        values: which grids.
        rounds: move the weights onto them, in place. They keep their dtype: the integer times the
            scale, rounded to it, from which the grid finds the same integer again
            (bfloat16 moves the quotient by at most 128 / 512), but where a row is of subnormal
            numbers.
        smooths: smooth inputs where what comes before can be divided, and energies are known.
    """
    scales: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    multipliers: dict[str, Tensor] = {}
    smoothed: dict[str, Tensor] = {}
    for group in decision:
        name = group.layout.group.name
        weights = {one: linear_of(layer, one).weight.data for one in group.masks}
        device = next(iter(weights.values())).device
        energy = torch.ones(group.layout.in_features, device=device)
        exponents = None
        if energies is not None:
            energy = energies[name].to(device)
            if smooths and group.layout.can_smooth:
                tied = group.layout.tied(energy)
                exponents = choose_exponents([*weights.values()], tied, values)
                smoothed[name] = exponents.cpu()
        for linear, weight in weights.items():
            grid: Grid
            if values == "int4":
                grid = chosen = _int4_grid(weight, energy, exponents)
                multipliers[linear] = chosen.multipliers.cpu()
            else:
                grid = Int8Grid(_scale(weight, energy, exponents), exponents)
            errors[linear] = relative_error(weight, energy, grid)
            scales[linear] = grid.scale.cpu()
            for rows in row_chunks(weight.shape) if rounds else ():
                weight[rows] = grid.rounded(weight[rows], rows=rows).to(weight.dtype)
    return RoundedLayer(scales, errors, multipliers, smoothed)


def _scale(weight: Tensor, energy: Tensor, exponents: Tensor | None) -> Tensor:
    """`choose_scale` of a weight with smoothed inputs."""
    met = _smoothed_energy(energy, exponents)
    parts = (multiplied(weight[rows], exponents) for rows in row_chunks(weight.shape))
    return torch.cat([choose_scale(part, met) for part in parts])


def _int4_grid(weight: Tensor, energy: Tensor, exponents: Tensor | None) -> Int4Grid:
    """`choose_grid` of a weight with smoothed inputs."""
    met = _smoothed_energy(energy, exponents)
    parts = (multiplied(weight[rows], exponents) for rows in row_chunks(weight.shape))
    grids = [choose_grid(part, met) for part in parts]
    scale = torch.cat([grid.scale for grid in grids])
    multipliers = torch.cat([grid.multipliers for grid in grids])
    return Int4Grid(scale, multipliers, exponents=exponents)


def _smoothed_energy(energy: Tensor, exponents: Tensor | None) -> Tensor:
    return energy if exponents is None else energy * torch.exp2(-2.0 * exponents)
