"""Recognise what a checkpoint is by its config.json, and open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permllm_offline.conversion.bitmask import FORMAT, BitmaskWeights
from permllm_offline.conversion.plain import PlainWeights
from permllm_offline.conversion.sources import WeightSource
from permllm_offline.errors import OfflineError
from permllm_offline.model.loading import Source
from permllm_vllm.checkpoint.schema import QUANT_METHOD
from permllm_vllm.checkpoint.shards import CONFIG_NAME, read_json

_COMPRESSED_TENSORS = ("compressed-tensors", "sparseml", None)
_KEYS = ("quantization_config", "compression_config")


def is_of_this_format(source: Source) -> bool:
    """Whether a checkpoint is a permllm one, by its config.json."""
    return _entries(source).get("quant_method") == QUANT_METHOD


def open_weights(source: Source) -> WeightSource:
    """Open a sparse checkpoint of another tool.

    Raises:
        OfflineError: it is of this format already, quantized, or of a format that is not read.
    """
    entries = _entries(source)
    method = entries.get("quant_method")
    if method == QUANT_METHOD:
        raise OfflineError(
            f"{source.name!r} is of this format already. Serve it, or give --to dense, or --values "
            "int8 where its values are of another dtype."
        )
    if method not in _COMPRESSED_TENSORS or entries.get("config_groups"):
        raise OfflineError(
            f"{source.name!r} is quantized (quant_method {method!r}): only sparse weights in "
            "bfloat16, float16 or float32 are converted. Give the sparse model from before its "
            "quantization."
        )
    sparsity = entries.get("sparsity_config", entries if "format" in entries else {}) or {}
    layout = sparsity.get("format", "dense")
    if layout == FORMAT:
        return BitmaskWeights(source.directory)
    if layout == "dense":
        return PlainWeights(source.directory, source.language.experts_under)
    raise OfflineError(
        f"{source.name!r} is stored as {layout!r}; read are plain weights with zeros and {FORMAT}. "
        "Decompress it with the tool that wrote it, and convert the result."
    )


def _entries(source: Source) -> Mapping[str, Any]:
    """What config.json says of quantization, or of compression; empty where it says nothing."""
    config = read_json(source.directory / CONFIG_NAME)
    return next((config[key] for key in _KEYS if config.get(key)), {})
