"""Choose int4 values: a scale for each row, a multiplier for each of its groups.

A group is the part of a row that meets 64 successive input channels, a block of the kernels. With
one scale for each row the products are int8 values as any others; checkpoints and kernels that know
of the multipliers hold them in 4 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_offline.sparsity.grid import grouped
from permllm_offline.sparsity.int8_values import CACHED_ELEMENTS
from permllm_offline.sparsity.smoothing import multiplied
from permllm_vllm.checkpoint.int4 import GROUP, LARGEST, MOST, SMALLEST, pack_int4
from permllm_vllm.checkpoint.schema import WEIGHT_MULTIPLIER, WEIGHT_PACKED

CLIPS = (0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of a group's largest magnitude that are tried as the middle of 7 and 8 steps."""

NEIGHBOURS = (0, -1, 1, -2, 2)
"""What is added to the nearest multiplier, to see whether another one errs less."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Int4Grid:
    """A `Grid` with a step for every group: float32 [out] times uint8 [out, groups].

    ``group`` successive columns have a multiplier together: as many as a group has of what is
    rounded, all channels or those that are kept. Where inputs are smoothed, ``exponents`` are int8
    [in].
    """

    scale: Tensor
    multipliers: Tensor
    group: int = GROUP
    exponents: Tensor | None = None

    def integers(self, weight: Tensor, *, rows: slice | Tensor = slice(None)) -> Tensor:
        """Round some rows of the weight to the nearest values: int8 [rows, n], to be scaled."""
        return self._nearest(multiplied(weight, self.exponents), rows).to(torch.int8)

    def rounded(
        self,
        weight: Tensor,
        *,
        rows: slice | Tensor = slice(None),
        columns: Tensor | None = None,
    ) -> Tensor:
        """The same as weights: float32 [rows, n].

        ``columns`` are the channels of the weights, int64 [rows, n], where n are not all of them.
        """
        nearest = self._nearest(multiplied(weight, self.exponents, columns), rows)
        rounded = nearest * self.scale[rows, None].to(weight.device)
        if self.exponents is None:
            return rounded
        return multiplied(rounded, -self.exponents, columns)

    def stored(self, integers: Tensor, *, rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """What a checkpoint holds for the integers of some rows that are kept: int8 [rows, n]."""
        multipliers = self.multipliers[rows]
        return {
            WEIGHT_PACKED: pack_int4(integers, multipliers),
            WEIGHT_MULTIPLIER: multipliers,
        }

    def _nearest(self, weight: Tensor, rows: slice | Tensor) -> Tensor:
        multipliers = self.multipliers[rows, :, None].to(weight.device, torch.float32)
        steps = multipliers * self.scale[rows, None, None].to(weight.device)
        integers = (grouped(weight, self.group) / steps).round_()
        integers = integers.clamp_(SMALLEST, LARGEST).mul_(multipliers)
        return integers.flatten(1)[:, : weight.shape[1]]


def choose_grid(weight: Tensor, channel_energy: Tensor, group: int = GROUP) -> Int4Grid:
    """Choose scales and multipliers by the least expected squared error of the layer's output.

    As `int8_values.choose_scale` does for whole rows: every group has the step that errs least, the
    row a scale that leaves room for the largest of them, and then each group the multiplier that
    errs least.

    Args:
        weight: floating [out, in], pruned weights zero (they stay zero).
        channel_energy: float32 [in], mean square of each input channel; ones without data.
        group: of the grid.
    """
    rows = max(1, CACHED_ELEMENTS // weight.shape[1])
    energy = grouped(channel_energy.float()[None], group)
    grids = [_choose_grid(grouped(part.float(), group), energy) for part in weight.split(rows)]
    scales, multipliers = zip(*grids, strict=True)
    return Int4Grid(torch.cat(scales), torch.cat(multipliers), group)


def _choose_grid(weight: Tensor, energy: Tensor) -> tuple[Tensor, Tensor]:
    steps = _best_steps(weight, energy)
    largest = steps.amax(1)
    scale = torch.where(largest > 0, (largest / MOST).clamp_min(_TINY), 1.0)
    nearest = (steps / scale[:, None]).round_().clamp_(1, MOST)
    best, smallest = nearest, torch.full_like(nearest, torch.inf)
    for more in NEIGHBOURS:
        multipliers = (nearest + more).clamp_(1, MOST)
        error = weight - _nearest(weight, multipliers * scale[:, None])
        error = (error.square_() * energy).sum(-1)
        better = error < smallest
        best = torch.where(better, multipliers, best)
        smallest = torch.where(better, error, smallest)
    return _refitted(weight, energy, scale, best), best.to(torch.uint8)


def _best_steps(weight: Tensor, energy: Tensor) -> Tensor:
    """The step of least error of every group: [rows, groups], 0 where it has no weights."""
    largest = weight.abs().amax(-1)
    weighted = weight * energy
    best, gained = largest / -SMALLEST, torch.zeros_like(largest)
    for clip in CLIPS:
        step = largest * (2 * clip / (LARGEST - SMALLEST))
        integers = _nearest(weight, step).div_(step.clamp_min(_TINY)[..., None])
        overlap = (integers * weighted).sum(-1)
        power = (integers.square_() * energy).sum(-1)
        # As in `int8_values`: least squares takes overlap^2 / power off the error.
        gain = torch.where(power > 0, overlap * (overlap / power), 0.0)
        better = gain > gained
        best = torch.where(better, overlap / power, best)
        gained = torch.where(better, gain, gained)
    return best


def _refitted(weight: Tensor, energy: Tensor, scale: Tensor, multipliers: Tensor) -> Tensor:
    """The scale of every row by least squares, for the integers that it has."""
    integers = _nearest(weight, multipliers * scale[:, None]) / scale[:, None, None]
    overlap = (integers * weight * energy).sum((1, 2))
    power = (integers.square() * energy).sum((1, 2))
    return torch.where(overlap > 0, overlap / power, scale)


def _nearest(weight: Tensor, steps: Tensor) -> Tensor:
    """[rows, groups, group] rounded to multiples of the step of their group."""
    steps = steps.clamp_min(_TINY)[..., None]
    return (weight / steps).round_().clamp_(SMALLEST, LARGEST).mul_(steps)
