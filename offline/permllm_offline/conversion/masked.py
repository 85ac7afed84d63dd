"""A dense checkpoint under masks that were published apart from it."""

from __future__ import annotations

from torch import Tensor

from permllm_offline.conversion.published_masks import PublishedMasks
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_vllm.checkpoint.headers import TensorHeader


class MaskedWeights:
    """Weights that a mask prunes are zero; kept are all others of its tensor, zeros among them.

    Raises:
        OfflineError: the checkpoint lacks a weight that has a mask.
    """

    def __init__(self, weights: WeightSource, masks: PublishedMasks) -> None:
        self.description = f"a dense checkpoint under the masks of {masks.name}"
        self._weights, self._masks = weights, masks
        missing = sorted(set(masks.names()) - set(weights.names()))
        if missing:
            raise OfflineError(
                f"the masks of {masks.name} are of another model: this one has no {missing[0]}."
            )

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return self._weights.names()

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor."""
        return self._weights.header(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor, zero where it is pruned."""
        tensor = self._weights.tensor(name)
        return tensor.masked_fill_(~self.kept(name), 0) if name in self._masks else tensor

    def kept(self, name: str) -> Tensor:
        """What the mask of a weight keeps; without one, which weights are stored or not zero."""
        if name in self._masks:
            return self._masks.mask(name, self.header(name).shape)
        return self._weights.kept(name)

    def row_scales(self, name: str) -> Tensor | None:
        """Those of the weights."""
        return self._weights.row_scales(name)
