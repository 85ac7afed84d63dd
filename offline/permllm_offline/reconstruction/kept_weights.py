"""Adam on the kept weights of pruned linears; nothing is held for pruned ones, which stay zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from permllm_offline.reconstruction.kept_values import (
    add_kept,
    gather_kept,
    kept_channels,
    scatter_kept,
)
from permllm_offline.run.processes import count, owners, rank, spread, total
from permllm_offline.sparsity.int4_values import Int4Grid

BETAS = (0.9, 0.95)
"""Of Adam: with hundreds of steps the second moment has no time for a longer memory."""

EPSILON = 1e-12
"""Of Adam: far below the gradients, so that a step does not depend on the scale of the loss."""

_FUSED_DEVICES = ("cpu", "cuda")


class KeptWeights:
    """The kept weights of some linears while they are tuned.

    A float32 copy takes the steps and the model holds its rounding, so that steps far below the
    spacing of bfloat16 add up. Inside the context, the weights want gradients; a backward pass adds
    those of the kept ones up here, and leaves none in the model. Where the weights have grids, the
    model holds the nearest values of these instead, and the steps are as if it did not
    (straight-through, as for a permutation): the others learn to make up for what rounding takes.

    Where several processes share them, each holds copies, states of Adam and best weights of its
    own linears alone (the first stage of ZeRO, arXiv 1910.02054); all take the same steps.

    Args:
        linears: with pruned weights already zero.
        masks: packed bits, uint8 [out_features, in_features / 8] of each, original channel order.
        grids: of each, or none; masks then keep half of every group.
        shared: whether the processes of the prune share them.
    """

    def __init__(
        self,
        linears: Sequence[nn.Linear],
        masks: Sequence[Tensor],
        *,
        grids: Sequence[Int4Grid] = (),
        shared: bool = False,
    ) -> None:
        self._linears, self._grids, self._shared = linears, grids, shared
        self._channels = [
            kept_channels(mask, linear.weight.device)
            for linear, mask in zip(linears, masks, strict=True)
        ]
        self._gradients = [
            torch.zeros(channels.shape, dtype=linear.weight.dtype, device=channels.device)
            for linear, channels in zip(linears, self._channels, strict=True)
        ]
        self._reached = [False] * len(linears)  # whether a backward pass left a gradient
        sizes = [linear.weight.numel() for linear in linears]
        self._owners = owners(sizes) if shared else [rank()] * len(linears)
        mine = [index for index, owner in enumerate(self._owners) if owner == rank()]
        self._trained = {
            index: _Trained(linears[index].weight.data, self._channels[index]) for index in mine
        }
        self._handles: list[RemovableHandle] = []
        if grids:
            self._load_tuned()

    def __enter__(self) -> KeptWeights:
        for index, linear in enumerate(self._linears):
            linear.weight.requires_grad_(True)
            hook = self._taking_gradient_of(index)
            self._handles.append(linear.weight.register_post_accumulate_grad_hook(hook))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for linear in self._linears:
            linear.weight.requires_grad_(False)
            linear.weight.grad = None  # of a backward pass that failed

    def step(self, learning_rate: float) -> None:
        """Move along the gradients of the backward passes since the last step, and drop these."""
        if self._shared and count() > 1:
            self._sum_over_processes()
        for index, trained in self._trained.items():
            if self._reached[index]:
                trained.step(self._gradients[index], learning_rate)
        self._reached = [False] * len(self._linears)
        self._load_tuned()

    def remember(self) -> None:
        """Keep the weights as the model has them now, in place of those kept before."""
        for index, trained in self._trained.items():
            gather_kept(self._linears[index].weight.data, self._channels[index], trained.best)

    def recall(self) -> None:
        """Give the model the weights that ``remember`` kept; tuning does not go on from them."""
        self._load(lambda trained: trained.best)

    def state(self) -> dict[str, Tensor]:
        """What ``load_state`` needs to go on as if nothing had happened; of this process' linears.

        Taken between two steps.
        """
        return {
            f"{index}.{key}": tensor
            for index, trained in self._trained.items()
            for key, tensor in trained.state().items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a state of all linears, the model's weights included."""
        for index, trained in self._trained.items():
            for key, tensor in trained.state().items():
                tensor.copy_(state[f"{index}.{key}"])
        self._load_tuned()

    def _sum_over_processes(self) -> None:
        for index, gradient in enumerate(self._gradients):
            if not self._reached[index]:
                gradient.zero_()
            total(gradient)
        # An expert that no token of any process came to takes no step, as in one process.
        self._reached = total(torch.tensor(self._reached, dtype=torch.int32)).bool().tolist()

    def _taking_gradient_of(self, index: int) -> Callable[[Tensor], None]:
        """A hook that adds the gradient of a linear's kept weights to those of earlier windows."""

        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            add = add_kept if self._reached[index] else gather_kept
            add(weight.grad, self._channels[index], self._gradients[index])
            self._reached[index], weight.grad = True, None

        return take

    def _load_tuned(self) -> None:
        self._load(lambda trained: trained.weight, self._grids)

    def _load(self, weights: Callable[[_Trained], Tensor], grids: Sequence[Int4Grid] = ()) -> None:
        """Give the model some weights of each linear, those of other processes too."""
        for index, (linear, owner) in enumerate(zip(self._linears, self._owners, strict=True)):
            weight = linear.weight.data
            if index in self._trained:
                grid = grids[index] if grids else None
                scatter_kept(weights(self._trained[index]), self._channels[index], weight, grid)
            if self._shared:
                spread(weight, owner)


class _Trained:
    """Float32 copy, states of Adam and best weights of the kept weights of one linear."""

    def __init__(self, weight: Tensor, channels: Tensor) -> None:
        shape, device = channels.shape, weight.device
        self.weight = torch.zeros(shape, dtype=torch.float32, device=device)
        fused = self.weight.device.type in _FUSED_DEVICES
        self.best = torch.zeros(shape, dtype=weight.dtype, device=device)
        gather_kept(weight, channels, self.weight)
        # A rate of its own is given at every step.
        self._optimizer = torch.optim.Adam(
            [self.weight], lr=0.0, betas=BETAS, eps=EPSILON, fused=fused
        )
        self._optimizer.state[self.weight] = {
            "step": torch.zeros((), device=self.weight.device),
            "exp_avg": torch.zeros_like(self.weight),
            "exp_avg_sq": torch.zeros_like(self.weight),
        }

    def step(self, gradient: Tensor, learning_rate: float) -> None:
        """Take one step of Adam."""
        self.weight.grad = gradient.float()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """The tensors themselves, by name."""
        return {"weight": self.weight, "best": self.best, **self._optimizer.state[self.weight]}
