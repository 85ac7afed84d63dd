"""Recognise what a checkpoint is by its config.json, and open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.conversion.bitmask import FORMAT, BitmaskWeights
from permllm_offline.conversion.plain import PlainWeights
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source
from permllm_offline.model.quantized import dense_form
from permllm_vllm.checkpoint.scaled_form import (
    COMPRESSED_TENSORS,
    FP8,
    ScaledForm,
    quantization_entries,
)
from permllm_vllm.checkpoint.schema import QUANT_METHOD
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json

_SPARSE = (COMPRESSED_TENSORS, "sparseml", None)


def is_of_this_format(source: Source) -> bool:
    """Whether a checkpoint is a permllm one, by its config.json."""
    return _entries(source).get("quant_method") == QUANT_METHOD


def open_weights(source: Source) -> WeightSource:
    """Open a sparse checkpoint of another tool.

    Raises:
        OfflineError: it is of this format already, quantized in a form that is not read, or of
            another format.
        CheckpointError: weights of 8 bits, and their scales, that cannot be read.
    """
    entries = _entries(source)
    method = entries.get("quant_method")
    if method == QUANT_METHOD:
        raise OfflineError(
            f"{source.name!r} is of this format already. Serve it, or give --to dense, or --values "
            "int8 where its values are of another dtype."
        )
    if method == FP8 or (method == COMPRESSED_TENSORS and entries.get("config_groups")):
        return _plain(source, dense_form(source.name, _config(source)))
    if method not in _SPARSE or entries.get("config_groups"):
        raise OfflineError(
            f"{source.name!r} is quantized (quant_method {method!r}): only sparse weights in "
            "bfloat16, float16, float32 or 8 bits with scales are converted. Give the sparse model "
            "from before its quantization."
        )
    sparsity = entries.get("sparsity_config", entries if "format" in entries else {}) or {}
    layout = sparsity.get("format", "dense")
    if layout == FORMAT:
        return BitmaskWeights(source.directory)
    if layout == "dense":
        return _plain(source)
    raise OfflineError(
        f"{source.name!r} is stored as {layout!r}; read are plain weights with zeros and {FORMAT}. "
        "Decompress it with the tool that wrote it, and convert the result."
    )


def _plain(source: Source, form: ScaledForm | None = None) -> PlainWeights:
    experts, dtype = source.language.experts_under, source.product_dtype
    return PlainWeights(source.directory, experts, form, dtype)


def _config(source: Source) -> dict[str, Any]:
    return read_json(source.directory / CONFIG_NAME)


def _entries(source: Source) -> Mapping[str, Any]:
    """What config.json says of quantization, or of compression; empty where it says nothing."""
    return quantization_entries(_config(source)) or {}
