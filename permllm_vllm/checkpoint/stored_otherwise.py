"""How `config.json` says that weights are stored otherwise than as plain numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.schema import is_of_this_format

QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""What says in `config.json`, or in its `text_config`, that a model is quantized."""
BITMASK, DENSE = "sparse-24-bitmask", "dense"
"""Layouts of compressed-tensors: without the zeros of 2:4, and with them."""
COMPRESSED_TENSORS, FP8 = "compressed-tensors", "fp8"
"""Methods whose weights `permllm-offline convert --to dense` restores."""
FROM_BEFORE = "give the model from before its quantization"

_OF_COMPRESSED_TENSORS = ("config_groups", "sparsity_config", "format", "kv_cache_scheme")
"""Its own entries, which tell it where no method is named."""
_EARLIER = "sparseml"  # the name of its method
_MARLIN = "marlin-24"  # integers in the order of a kernel, which nothing unpacks
_NUMBERS_ALONE = (
    *(None, DENSE, "fakequant", "float-quantized", "int-quantized", "naive-quantized"),
    "pack-quantized",
)
"""Formats that leave weights as they are where no group of them is quantized."""


class StoredOtherwise(NamedTuple):
    """The method by which weights are quantized, or empty, and the layout of their zeros."""

    method: str
    layout: str

    @property
    def remedy(self) -> str:
        """What makes a model of it that is read."""
        if not self.method and self.layout == BITMASK:
            return "make it a checkpoint of this format by `permllm-offline convert`"
        if self.method in (COMPRESSED_TENSORS, FP8) and self.layout == DENSE:
            return "write it as a dense model first, by `permllm-offline convert --to dense`"
        return FROM_BEFORE


def stored_otherwise(config: Mapping[str, Any]) -> StoredOtherwise | None:
    """Return how a `config.json` says that weights are stored; None of plain numbers.

    A checkpoint of this format, which `is_of_this_format` tells, has None too. Raises
    `CheckpointError` for entries that are no JSON objects.
    """
    said = {} if is_of_this_format(config) else quantization_entries(config)
    method = said.get("quant_method")
    if not said:
        return None
    of_compressed_tensors = method in (COMPRESSED_TENSORS, _EARLIER) or (
        method is None and any(key in said for key in _OF_COMPRESSED_TENSORS)
    )
    if not of_compressed_tensors:
        return StoredOtherwise(str(method), DENSE)
    sparsity = _object("sparsity_config", said.get("sparsity_config"))
    groups = _object("config_groups", said.get("config_groups"))
    layout = sparsity.get("format") or DENSE
    formats = [_object("config_groups", group).get("format") for group in groups.values()]
    if _MARLIN in (said.get("format"), *formats):
        layout = _MARLIN
    transforms = _object("transform_config", said.get("transform_config")).get("config_groups")
    if groups or transforms:
        return StoredOtherwise(COMPRESSED_TENSORS, str(layout))
    if layout == DENSE and not sparsity and said.get("format") not in _NUMBERS_ALONE:
        layout = said["format"]
    return None if layout == DENSE else StoredOtherwise("", str(layout))


def quantization_entries(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a `config.json` says of quantization, empty where it says nothing.

    Of what stands inside one another, as in older `compression_config`s, the inner entries count,
    and the outer ones that these lack. Raises `CheckpointError` for anything but JSON objects.
    """
    for place in (config, config.get("text_config")):
        if not isinstance(place, Mapping):
            continue
        for key in QUANTIZATION_KEYS:
            outer = _object(key, place.get(key))
            if outer:
                inner = _object(key, outer.get(QUANTIZATION_KEYS[0]))
                return {**outer, **inner}
    return {}


def require_plain(config: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` for weights that are stored otherwise than as plain numbers."""
    found = stored_otherwise(config)
    if found is not None:
        value = " in ".join(filter(None, (found.method, found.layout.removeprefix(DENSE))))
        rule = "weights are stored as plain numbers, or by the method 'permllm'"
        raise Problem("config.json quantization_config", value, rule, found.remedy).as_error()


def _object(key: str, found: object) -> Mapping[str, Any]:
    """Entries of a key, none for null."""
    if found is None:
        return {}
    if not isinstance(found, Mapping):
        where = f"config.json {key}"
        raise Problem(where, repr(found), "a JSON object", FROM_BEFORE).as_error()
    return found
