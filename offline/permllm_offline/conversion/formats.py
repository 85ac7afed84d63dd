"""Recognise what a sparse checkpoint of another tool is by its config.json, and open it."""

from __future__ import annotations

from collections.abc import Callable

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.marlin_files import MarlinFiles
from permllm_offline.conversion.masked import MaskedWeights
from permllm_offline.conversion.plain import PlainWeights
from permllm_offline.conversion.published_masks import PublishedMasks
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.conversion.without_zeros import SparseFiles, WeightsWithoutZeros
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source
from permllm_offline.model.quantized import dense_form
from permllm_vllm.checkpoint.scaled_form import BITMASK, MARLIN, sparse_layout
from permllm_vllm.checkpoint.scaled_tensors import open_parts
from permllm_vllm.checkpoint.schema import is_of_this_format
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.stored_files import StoredFiles, TensorParts

LAYOUTS: dict[str, Callable[[TensorParts], SparseFiles]] = {
    BITMASK: BitmaskFiles,
    MARLIN: MarlinFiles,
}
"""What reads weights that are stored without their zeros."""


def open_weights(source: Source, masks: PublishedMasks | None = None) -> WeightSource:
    """Open a sparse checkpoint of another tool, or a dense one under masks.

    Raises:
        OfflineError: it is of this format already, quantized in a form that is not read, or of
            another format; or the masks are not for it.
        CheckpointError: a configuration that says nothing sound of either, or weights of 8 bits,
            and their scales, that cannot be read.
    """
    config = read_json(source.directory / CONFIG_NAME)
    if is_of_this_format(config):
        raise OfflineError(
            f"{source.name!r} is of this format already. Serve it, or give --to dense, or --values "
            "int8 where its values are of another dtype."
        )
    layout = sparse_layout(config)
    if layout is None:
        files = open_parts(source.directory, dense_form(source.name, config), source.product_dtype)
        weights = PlainWeights(files, source.language.experts_under)
        return weights if masks is None else MaskedWeights(weights, masks)
    if masks is not None:
        raise OfflineError(
            f"{source.name!r} is stored as {layout!r}, without its pruned weights: masks are for "
            "the dense model that they were learned for. Leave out --masks, or give that model."
        )
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise OfflineError(
            f"{source.name!r} is stored as {layout!r}; read are plain weights with zeros, "
            f"{' and '.join(LAYOUTS)}. Decompress it with the tool that wrote it, and convert the "
            "result."
        )
    form = dense_form(source.name, config, layout)
    opened = LAYOUTS[layout](StoredFiles(source.directory))
    return WeightsWithoutZeros(opened, form, source.product_dtype, source.language.experts_under)
