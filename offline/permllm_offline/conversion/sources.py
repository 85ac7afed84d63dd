"""What a sparse checkpoint of another tool is to a conversion: weights, and which were kept."""

from __future__ import annotations

from torch import Tensor

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.published_masks import PublishedMasks
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source
from permllm_offline.model.quantized import require_read
from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.schema import is_of_this_format
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles
from permllm_vllm.checkpoint.stored_otherwise import BITMASK, StoredOtherwise, stored_otherwise
from permllm_vllm.checkpoint.tensors import StoredTensors


class WeightSource:
    """A checkpoint seen as a plain one, and which of its weights were kept.

    Those are what a bitmask stores, or a published mask keeps, zeros among them; elsewhere all but
    zeros.

    Raises:
        OfflineError: the checkpoint lacks a weight that has a mask.
    """

    def __init__(
        self,
        files: StoredFiles | BitmaskFiles,
        masks: PublishedMasks | None = None,
    ) -> None:
        self._bitmask = files if isinstance(files, BitmaskFiles) else None
        self._stored = StoredTensors(files)
        self._masks = masks
        self.description = "a dense checkpoint with zeros"
        if self._bitmask is not None:
            self.description = f"compressed-tensors {BITMASK}"
        if masks is None:
            return
        self.description = f"a dense checkpoint under the masks of {masks.name}"
        missing = sorted(set(masks.names()) - set(self.names()))
        if missing:
            raise OfflineError(
                f"the masks of {masks.name} are of another model: this one has no {missing[0]}."
            )

    def names(self) -> list[str]:
        """Names of all tensors, layer 2 before layer 10."""
        return self._stored.names()

    def header(self, name: str) -> TensorHeader:
        """Shape and dtype of a tensor."""
        return self._stored.header(name)

    def tensor(self, name: str) -> Tensor:
        """The tensor, zero where it is pruned."""
        tensor = self._stored.tensor(name)
        if self._masks is not None and name in self._masks:
            return tensor.masked_fill_(~self.kept(name), 0)
        return tensor

    def kept(self, name: str) -> Tensor:
        """Which weights of a matrix were kept: bool, of its shape."""
        if self._masks is not None and name in self._masks:
            return self._masks.mask(name, self.header(name).shape)
        if self._bitmask is not None and self._bitmask.is_sparse(name):
            return self._bitmask.kept(name)
        return self._stored.tensor(name) != 0


def open_weights(source: Source, masks: PublishedMasks | None = None) -> WeightSource:
    """Open a sparse checkpoint of another tool, or a dense one under masks.

    Raises:
        OfflineError: it is of this format already, quantized, or of another format; or the masks
            are not for it.
        CheckpointError: a configuration or a bitmask that is damaged.
    """
    config = read_json(source.directory / CONFIG_NAME)
    if is_of_this_format(config):
        raise OfflineError(
            f"{source.name!r} is of this format already. Serve it, or give --to dense, or --values "
            "int8 where its values are of another dtype."
        )
    files = StoredFiles(source.directory)
    if stored_otherwise(config) != StoredOtherwise("", BITMASK):
        require_read(source.name, config)
        return WeightSource(files, masks)
    if masks is not None:
        raise OfflineError(
            f"{source.name!r} is stored as {BITMASK!r}, without its pruned weights: masks are for "
            "the dense model that they were learned for. Leave out --masks, or give that model."
        )
    return WeightSource(BitmaskFiles(files))
