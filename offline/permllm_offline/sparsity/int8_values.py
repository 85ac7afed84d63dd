"""Int8 values: one scale per output channel, chosen for the error that the layer's output sees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_offline.sparsity.smoothing import multiplied
from permllm_vllm.checkpoint.schema import WEIGHT_PACKED

SMALLEST, LARGEST = -128, 127
CLIPS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
"""Shares of a row's largest magnitude that are tried as the end of the int8 range."""

CACHED_ELEMENTS = 1 << 16
"""Elements of a weight that are worked on at once, so that they stay in a core's own cache."""


def choose_scale(weight: Tensor, channel_energy: Tensor) -> Tensor:
    """Choose each row's scale by the least expected squared error of the layer's output.

    With uncorrelated input channels, rounding `w` to `s * q` costs `sum_j energy_j (w_j - s q_j)^2`
    on average. For the integers of every clip the scale is refitted by least squares; best wins.

    Args:
        weight: floating [out, in], pruned weights zero (they stay zero: 0 rounds to 0).
        channel_energy: float32 [in], mean square of each input channel; ones without data.

    Returns:
        float32 [out], finite and above 0; 1 for a row of zeros.
    """
    rows = max(1, CACHED_ELEMENTS // weight.shape[1])
    energy = channel_energy.float()
    return torch.cat([_choose_scale(part.float(), energy) for part in weight.split(rows)])


def _choose_scale(weight: Tensor, energy: Tensor) -> Tensor:
    largest = weight.abs().amax(1)
    weighted = weight * energy
    best = torch.ones_like(largest)
    gained = torch.zeros_like(largest)
    for clip in CLIPS:
        scale = torch.where(largest == 0, 1.0, largest * clip / LARGEST)
        integers = (weight / scale[:, None]).round_().clamp_(SMALLEST, LARGEST)
        overlap = (integers * weighted).sum(1)
        power = integers.square_() @ energy
        # Least squares: the scale is overlap / power, and takes overlap^2 / power off the error.
        gain = torch.where(power > 0, overlap * (overlap / power), 0.0)
        better = gain > gained
        best = torch.where(better, overlap / power, best)
        gained = torch.where(better, gain, gained)
    return torch.where((gained == 0) & (largest > 0), largest / LARGEST, best)


@dataclass(frozen=True)
class Int8Grid:
    """A `Grid` of all int8: float32 [out]; int8 [in] where inputs are smoothed."""

    scale: Tensor
    exponents: Tensor | None = None

    def integers(self, weight: Tensor, *, rows: slice | Tensor = slice(None)) -> Tensor:
        """Round some rows of the weight: int8 [rows, n], to be scaled."""
        return round_to_int8(multiplied(weight, self.exponents), self.scale[rows])

    def rounded(self, weight: Tensor, *, rows: slice | Tensor = slice(None)) -> Tensor:
        """The same as weights: float32 [rows, n]."""
        rounded = self.integers(weight, rows=rows).float() * self.scale[rows, None]
        return rounded if self.exponents is None else multiplied(rounded, -self.exponents)

    def stored(self, integers: Tensor, *, rows: slice | Tensor = slice(None)) -> dict[str, Tensor]:
        """What a checkpoint holds for the integers of some rows that are kept: int8 [rows, n]."""
        return {WEIGHT_PACKED: integers}


def round_to_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """Round `weight / scale` to the nearest int8; [out, in] and [out] -> int8 [out, in]."""
    return (weight.float() / scale[:, None]).round().clamp(SMALLEST, LARGEST).to(torch.int8)
