"""Recognise what a sparse checkpoint of another tool is by its config.json, and open it."""

from __future__ import annotations

from permllm_offline.conversion.bitmask import FORMAT, BitmaskWeights
from permllm_offline.conversion.plain import PlainWeights
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source
from permllm_offline.model.quantized import dense_form
from permllm_vllm.checkpoint.scaled_form import sparse_format
from permllm_vllm.checkpoint.scaled_tensors import open_parts
from permllm_vllm.checkpoint.schema import is_of_this_format
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json
from permllm_vllm.checkpoint.tensors import StoredTensors


def open_weights(source: Source) -> WeightSource:
    """Open a sparse checkpoint of another tool.

    Raises:
        OfflineError: it is of this format already, quantized in a form that is not read, or of
            another format.
        CheckpointError: a configuration that says nothing sound of either, or weights of 8 bits,
            and their scales, that cannot be read.
    """
    config = read_json(source.directory / CONFIG_NAME)
    if is_of_this_format(config):
        raise OfflineError(
            f"{source.name!r} is of this format already. Serve it, or give --to dense, or --values "
            "int8 where its values are of another dtype."
        )
    sparse = sparse_format(config)
    if sparse == FORMAT:
        return BitmaskWeights(source.directory)
    if sparse is not None:
        raise OfflineError(
            f"{source.name!r} is stored as {sparse!r}; read are plain weights with zeros and "
            f"{FORMAT}. Decompress it with the tool that wrote it, and convert the result."
        )
    form = dense_form(source.name, config)
    files = open_parts(source.directory, form, source.product_dtype)
    return PlainWeights(StoredTensors(files, experts_under=source.language.experts_under))
