"""What passes from one decoder layer to the next, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

_HIDDEN, _TOKENS = "hidden", "tokens"


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
        """The same on a device."""
        return self._each(lambda tensor: tensor.to(device))

    def one_by_one(self) -> Iterator[States]:
        """Yield the states of each window."""
        return (self[index : index + 1] for index in range(len(self)))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by a name, for ``of``."""
        found = {_HIDDEN: self.hidden}
        if self.tokens is not None:
            found[_TOKENS] = self.tokens
        return found | {
            f"{name}:{place}": tensor
            for name, tensors in self.handed_on.items()
            for place, tensor in enumerate(tensors)
        }

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> States:
        """Put together what ``tensors`` gave."""
        handed_on: dict[str, tuple[Tensor, ...]] = {}
        for key in tensors:  # in order: places ascend
            name, colon, _ = key.rpartition(":")
            if colon:
                handed_on[name] = (*handed_on.get(name, ()), tensors[key])
        return cls(tensors[_HIDDEN], tensors.get(_TOKENS), handed_on)

    def _each(self, change: Callable[[Tensor], Tensor]) -> States:
        return replace(
            self,
            hidden=change(self.hidden),
            tokens=None if self.tokens is None else change(self.tokens),
            handed_on={name: tuple(map(change, them)) for name, them in self.handed_on.items()},
        )
