"""Adam on the kept weights of pruned linears; pruned ones stay zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from permllm_offline.run.processes import owners, rank, spread

BETAS = (0.9, 0.95)
"""Of Adam: with hundreds of steps the second moment has no time for a longer memory."""

EPSILON = 1e-12
"""Of Adam: far below the gradients, so that a step does not depend on the scale of the loss."""

_FUSED_DEVICES = ("cpu", "cuda")


class KeptWeights:
    """The kept weights of some linears while they are tuned.

    A float32 copy takes the steps and the model holds its rounding, so that steps far below the
    spacing of bfloat16 add up. Inside the context, the weights want gradients.

    Where several processes share them, each holds copies, states of Adam, masks and snapshots of
    its own linears alone (the first stage of ZeRO, arXiv 1910.02054); all take the same steps.

    Args:
        linears: with pruned weights already zero.
        masks: bool [out_features, in_features] of each, original channel order.
        shared: whether the processes of the prune share them.
    """

    def __init__(
        self, linears: Sequence[nn.Linear], masks: Sequence[Tensor], *, shared: bool = False
    ) -> None:
        self._linears, sizes = linears, [linear.weight.numel() for linear in linears]
        self._owners = owners(sizes) if shared else [rank()] * len(linears)
        self._shared = shared
        mine = [index for index, owner in enumerate(self._owners) if owner == rank()]
        self._masks = {index: masks[index].to(linears[index].weight.device) for index in mine}
        self._masters = {index: linears[index].weight.detach().float() for index in mine}
        fused = all(linear.weight.device.type in _FUSED_DEVICES for linear in linears)
        # A rate of its own is given at every step.
        self._optimizer = torch.optim.Adam(
            list(self._masters.values()), lr=0.0, betas=BETAS, eps=EPSILON, fused=fused
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

    @property
    def mine(self) -> list[int]:
        """Numbers of the linears that this process moves: all of them where it is the only one."""
        return list(self._masters)

    def step(self, learning_rate: float) -> None:
        """Move along the gradients that the weights hold, and drop these."""
        for index, master in self._masters.items():
            gradient = self._linears[index].weight.grad
            # A linear that the loss does not reach has none.
            master.grad = None if gradient is None else gradient.float().mul_(self._masks[index])
        for linear in self._linears:
            linear.weight.grad = None
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.load(self._masters)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, for ``load_state``; of this process' linears."""
        moments = {index: self._optimizer.state[master] for index, master in self._masters.items()}
        return {f"{index}.weight": master for index, master in self._masters.items()} | {
            f"{index}.{key}": tensor
            for index, moment in moments.items()
            for key, tensor in moment.items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of all linears, the model's weights included."""
        for index, master in self._masters.items():
            prefix, device = f"{index}.", master.device
            master.copy_(state[prefix + "weight"])
            moments = {
                key.removeprefix(prefix): tensor.to(device)
                for key, tensor in state.items()
                if key.startswith(prefix) and key != prefix + "weight"
            }
            if moments:  # a linear that the loss does not reach has none
                self._optimizer.state[master] = moments
        self.load(self._masters)

    def snapshot(self) -> dict[int, Tensor]:
        """Copies of this process' weights, as the model holds them now, by number of the linear."""
        return {index: self._linears[index].weight.detach().clone() for index in self._masters}

    def load(self, weights: Mapping[int, Tensor]) -> None:
        """Give the model weights as ``snapshot`` returns them; tuning does not go on from them."""
        for index, (linear, owner) in enumerate(zip(self._linears, self._owners, strict=True)):
            if index in weights:
                linear.weight.data.copy_(weights[index])
            if self._shared:
                spread(linear.weight.data, owner)
