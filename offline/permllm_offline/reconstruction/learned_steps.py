"""Tune the steps of int4 values beside the weights that are rounded to them (LSQ)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from permllm_offline.sparsity.int4_values import Int4Grid, with_steps
from permllm_offline.sparsity.int8_values import CACHED_ELEMENTS

RATE = 30.0
"""By which the logarithm of a step moves, in learning rates of the weights."""


class LearnedSteps:
    """The steps of all groups of one linear, while its kept weights are tuned.

    Their logarithms follow the gradient of the same loss, straight through the rounding (LSQ, arXiv
    1902.08153, Eq. 3), by Adam. After each step the row has the scale that leaves room for its
    largest group, and each group the multiplier nearest to what it has come to.

    Args:
        grid: of the kept weights; where they start.
        betas: of Adam.
        epsilon: of Adam.
        device: of the weights.
    """

    def __init__(
        self, grid: Int4Grid, betas: tuple[float, float], epsilon: float, device: torch.device
    ) -> None:
        self._grid = replace(
            grid, scale=grid.scale.to(device), multipliers=grid.multipliers.to(device)
        )
        self._best = self._grid
        self._logarithms = self._grid.steps().log()
        self._optimizer = torch.optim.Adam([self._logarithms], lr=0.0, betas=betas, eps=epsilon)
        self._optimizer.state[self._logarithms] = {
            "step": torch.zeros((), device=device),
            "exp_avg": torch.zeros_like(self._logarithms),
            "exp_avg_sq": torch.zeros_like(self._logarithms),
        }

    @property
    def grid(self) -> Int4Grid:
        """The grid as it is now."""
        return self._grid

    @property
    def best(self) -> Int4Grid:
        """The grid that ``remember`` kept."""
        return self._best

    def step(
        self, weight: Tensor, channels: Tensor, gradient: Tensor, learning_rate: float
    ) -> None:
        """Take one step of Adam.

        Args:
            weight: float32 [out, kept], before it is rounded.
            channels: integers [out, kept], of each weight.
            gradient: [out, kept], of the loss in the rounded weights.
            learning_rate: of the weights.
        """
        self._logarithms.grad = self._gradient(weight, channels, gradient)
        for group in self._optimizer.param_groups:
            group["lr"] = RATE * learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._grid = with_steps(self._grid, self._logarithms.exp())

    def remember(self) -> None:
        """Keep the grid as it is now."""
        self._best = self._grid

    def state(self) -> dict[str, Tensor]:
        """All that a run that was cut off needs."""
        adam = self._optimizer.state[self._logarithms]
        return {
            "logarithms": self._logarithms,
            **{f"logarithms.{key}": tensor for key, tensor in adam.items()},
            "scale": self._grid.scale,
            "multipliers": self._grid.multipliers,
            "best_scale": self._best.scale.clone(),  # files do not take one tensor twice
            "best_multipliers": self._best.multipliers.clone(),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` gave."""
        adam = self._optimizer.state[self._logarithms]
        self._logarithms.copy_(state["logarithms"])
        for key, tensor in adam.items():
            tensor.copy_(state[f"logarithms.{key}"])
        device = self._logarithms.device
        self._grid, self._best = (
            replace(
                self._grid,
                scale=state[f"{which}scale"].to(device, copy=True),
                multipliers=state[f"{which}multipliers"].to(device, copy=True),
            )
            for which in ("", "best_")
        )

    def _gradient(self, weight: Tensor, channels: Tensor, gradient: Tensor) -> Tensor:
        """Of the loss in the logarithms of the steps: float32 [out, groups]."""
        count = max(1, CACHED_ELEMENTS // weight.shape[1])
        parts = []
        for first in range(0, len(weight), count):
            rows = slice(first, first + count)
            columns = channels[rows].to(torch.int64)
            change = self._grid.change_by_steps(weight[rows], rows=rows, columns=columns)
            parts.append(self._grid.summed_by_group(change.mul_(gradient[rows])))
        return torch.cat(parts)
