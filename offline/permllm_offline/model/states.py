"""What passes from one decoder layer to the next, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

HIDDEN = "hidden"
"""Name of the hidden states among the tensors."""


@dataclass(frozen=True)
class States:
    """Hidden states of windows, and what some models pass beside them.

    ``hidden`` is [windows, sequence_length, hidden]. ``tokens`` is int64 [windows, sequence_length]
    where a layer's call has arguments that follow from each token, into those of
    ``LayerCall.by_token``. ``handed_on`` are keys and values for later layers, by what the model
    calls them: [windows, heads, sequence_length, channels].
    """

    hidden: Tensor
    tokens: Tensor | None = None
    handed_on: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.hidden)

    def __getitem__(self, windows: slice | Tensor) -> States:
        """The states of some windows."""
        return self._each(lambda tensor: tensor[windows])

    def to(self, device: torch.device) -> States:
        """The same on a device; tokens stay, since what they stand for does."""
        return replace(self._each(lambda tensor: tensor.to(device)), tokens=self.tokens)

    def one_by_one(self) -> Iterator[States]:
        """Yield the states of each window."""
        return (self[index : index + 1] for index in range(len(self)))

    def tensors(self) -> dict[str, Tensor]:
        """By name what layers give, and ``with_tensors`` takes: all but the tokens."""
        return {HIDDEN: self.hidden} | {
            f"{name}:{place}": tensor
            for name, tensors in self.handed_on.items()
            for place, tensor in enumerate(tensors)
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> States:
        """The states of the same windows from what ``tensors`` gave."""
        handed_on: dict[str, tuple[Tensor, ...]] = {}
        for key in sorted(tensors):  # places ascend
            name, colon, _ = key.rpartition(":")
            if colon:
                handed_on[name] = (*handed_on.get(name, ()), tensors[key])
        return States(tensors[HIDDEN], self.tokens, handed_on)

    def _each(self, change: Callable[[Tensor], Tensor]) -> States:
        return replace(
            self,
            hidden=change(self.hidden),
            tokens=None if self.tokens is None else change(self.tokens),
            handed_on={name: tuple(map(change, them)) for name, them in self.handed_on.items()},
        )
