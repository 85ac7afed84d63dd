"""How `config.json` says that weights are stored in 8 bits; other quantizations are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from permllm_vllm.checkpoint.errors import Problem
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.schema import QUANT_METHOD

FP8, COMPRESSED_TENSORS = "fp8", "compressed-tensors"
QUANTIZATION_KEYS = ("quantization_config", "compression_config")
"""What says in `config.json`, or in its `text_config`, that a model is quantized."""
FROM_BEFORE = "give the model from before its quantization"
"""The remedy where weights cannot be read."""

_FLOAT8, _INT8 = "float8_e4m3fn", "int8"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized")


@dataclass(frozen=True)
class ScaledForm:
    """How weights are stored: their dtype by torch's name, and what of a matrix shares a scale."""

    stored: str
    block: Block


def quantization_entries(config: Mapping[str, Any]) -> Any:
    """Return what a `config.json` says of quantization; None where it says nothing."""
    places = (config, _mapping(config, "text_config"))
    found = (place.get(key) for place in places for key in QUANTIZATION_KEYS)
    return next((entries for entries in found if entries is not None), None)


def scaled_form(config: Mapping[str, Any]) -> ScaledForm | None:
    """Return how a `config.json` says that weights are stored in 8 bits; None of a plain model.

    Forms are those of Transformers' `FineGrainedFP8Config`, and of compressed-tensors. Raises
    `CheckpointError` for any other quantization.
    """
    entries = quantization_entries(config)
    if entries is None:
        return None
    method = entries.get("quant_method") if isinstance(entries, Mapping) else entries
    if method == FP8:
        size = entries.get("weight_block_size")
        block = Block(None, None) if size is None else _block("weight_block_size", size)
        return ScaledForm(_FLOAT8, block)
    if method == COMPRESSED_TENSORS:
        return _of_groups(entries)
    rule = f"read are {QUANT_METHOD!r}, and 8 bits by {FP8!r} or {COMPRESSED_TENSORS!r}"
    raise _problem("quant_method", repr(method), rule).as_error()


def _of_groups(entries: Mapping[str, Any]) -> ScaledForm:
    """The form of a compressed-tensors checkpoint, which all of its groups share."""
    sparsity = _mapping(entries, "sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise _problem("sparsity_config.format", repr(sparsity), "'dense'").as_error()
    if _mapping(entries, "transform_config").get("config_groups"):
        rule = "none: activations would have to be transformed as well"
        raise _problem("transform_config", "transforms of weights", rule).as_error()
    groups = _mapping(entries, "config_groups")
    forms = [
        _of_group(f"config_groups.{key}", _mapping(groups, key), entries.get("format"))
        for key in groups
        if _mapping(groups, key).get("weights")
    ]
    if len(set(forms)) != 1:
        found = [f"{form.stored} in blocks of {list(form.block)}" for form in forms]
        rule = "weights of 8 bits, all in one form"
        raise _problem("config_groups", " and ".join(found) or "no weights", rule).as_error()
    return forms[0]


def _of_group(key: str, group: Mapping[str, Any], layout: object) -> ScaledForm:
    layout, key = group.get("format") or layout, f"{key}.weights"
    if layout not in _FORMATS:
        raise _problem("format", repr(layout), f"one of {', '.join(_FORMATS)}").as_error()
    weights = _mapping(group, "weights")
    kind, bits = weights.get("type"), weights.get("num_bits")
    if kind not in ("float", "int") or bits != 8:
        raise _problem(key, f"{kind} of {bits} bits", "float or int of 8 bits").as_error()
    if not weights.get("symmetric", True):
        rule = "true: a weight is its value times a scale"
        raise _problem(f"{key}.symmetric", "false", rule).as_error()
    return ScaledForm(_FLOAT8 if kind == "float" else _INT8, _of_strategy(key, weights))


def _of_strategy(key: str, weights: Mapping[str, Any]) -> Block:
    strategy = weights.get("strategy")
    if strategy == "tensor":
        return Block(None, None)
    if strategy == "channel":
        return Block(1, None)
    if strategy == "group":
        return _block(f"{key}.group_size", [1, weights.get("group_size")])
    if strategy == "block":
        return _block(f"{key}.block_structure", weights.get("block_structure"))
    rule = "tensor, channel, group or block"
    raise _problem(f"{key}.strategy", repr(strategy), rule).as_error()


def _block(key: str, size: object) -> Block:
    """Rows and columns, as a list of both."""
    if isinstance(size, list | tuple) and len(size) == 2:
        rows, columns = size
        if type(rows) is type(columns) is int and min(rows, columns) > 0:
            return Block(rows, columns)
    rule = "two whole numbers above 0, of rows and columns"
    raise _problem(key, repr(size), rule).as_error()


def _mapping(entries: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Entries of an entry; none where it is anything but a JSON object."""
    found = entries.get(key)
    return found if isinstance(found, Mapping) else {}


def _problem(key: str, value: str, rule: str) -> Problem:
    return Problem(f"config.json {QUANTIZATION_KEYS[0]}.{key}", value, rule, FROM_BEFORE)
