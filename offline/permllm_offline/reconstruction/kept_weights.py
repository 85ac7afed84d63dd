"""Adam on the kept weights of pruned linears; pruned ones stay zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
"""Of Adam: with hundreds of steps the second moment has no time for a longer memory."""

EPSILON = 1e-12
"""Of Adam: far below the gradients, so that a step does not depend on the scale of the loss."""

_FUSED_DEVICES = ("cpu", "cuda")


class KeptWeights:
    """The kept weights of some linears while they are tuned.

    A float32 copy takes the steps and the model holds its rounding, so that steps far below the
    spacing of bfloat16 add up. Inside the context, the weights want gradients.

    Args:
        linears: with pruned weights already zero.
        masks: bool [out_features, in_features] of each, original channel order.
    """

    def __init__(self, linears: Sequence[nn.Linear], masks: Sequence[Tensor]) -> None:
        self._linears = linears
        self._masks = [
            mask.to(linear.weight.device) for linear, mask in zip(linears, masks, strict=True)
        ]
        self._masters = [linear.weight.detach().float() for linear in linears]
        fused = all(linear.weight.device.type in _FUSED_DEVICES for linear in linears)
        # A rate of its own is given at every step.
        self._optimizer = torch.optim.Adam(
            self._masters, lr=0.0, betas=BETAS, eps=EPSILON, fused=fused
        )

    def __enter__(self) -> KeptWeights:
        for linear in self._linears:
            linear.weight.requires_grad_(True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for linear in self._linears:
            linear.weight.requires_grad_(False)
            linear.weight.grad = None

    @property
    def weights(self) -> list[Tensor]:
        """The weights as the model holds them, with their gradients."""
        return [linear.weight for linear in self._linears]

    def step(self, learning_rate: float) -> None:
        """Move along the gradients that the weights hold, and drop these."""
        for linear, master, mask in zip(self._linears, self._masters, self._masks, strict=True):
            gradient = linear.weight.grad
            # A linear that the loss does not reach has none.
            master.grad = None if gradient is None else gradient.float().mul_(mask)
            linear.weight.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        for linear, master in zip(self._linears, self._masters, strict=True):
            linear.weight.data.copy_(master)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, for ``load_state``."""
        moments = [self._optimizer.state[master] for master in self._masters]
        return {f"{index}.weight": master for index, master in enumerate(self._masters)} | {
            f"{index}.{key}": tensor
            for index, moment in enumerate(moments)
            for key, tensor in moment.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state, the model's weights included."""
        for index, (linear, master) in enumerate(zip(self._linears, self._masters, strict=True)):
            prefix, device = f"{index}.", master.device
            master.copy_(state[prefix + "weight"])
            moments = {
                key.removeprefix(prefix): tensor.to(device)
                for key, tensor in state.items()
                if key.startswith(prefix) and key != prefix + "weight"
            }
            if moments:  # a linear that the loss does not reach has none
                self._optimizer.state[master] = moments
            linear.weight.data.copy_(master)

    def snapshot(self) -> list[Tensor]:
        """Copies of the weights as the model holds them now."""
        return [linear.weight.detach().clone() for linear in self._linears]

    def load(self, weights: Sequence[Tensor]) -> None:
        """Give the model back weights of ``snapshot``; tuning does not go on from them."""
        for linear, weight in zip(self._linears, weights, strict=True):
            linear.weight.data.copy_(weight)
