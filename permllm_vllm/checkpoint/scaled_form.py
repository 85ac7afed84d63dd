"""How `config.json` says that weights are stored in few bits; other quantizations are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from permllm_vllm.checkpoint.quantization_entries import QuantizationEntries, quantization_entries
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.schema import QUANT_METHOD, is_of_this_format

FP8, COMPRESSED_TENSORS = "fp8", "compressed-tensors"
DENSE = "dense"
"""The layout of weights that are stored with their zeros."""
BITMASK, MARLIN = "sparse-24-bitmask", "marlin-24"
"""Layouts of compressed-tensors that leave out the zeros of 2:4."""

_CONVERT = "make it a checkpoint of this format by `permllm-offline convert`"
"""The remedy where sparse weights are stored so, and dense ones are read."""

_OF_COMPRESSED_TENSORS = ("config_groups", "sparsity_config", "format", "kv_cache_scheme")
"""Its own entries, which tell it where no method is named."""
_EARLIER = "sparseml"  # the name of its method
_FLOAT8, _INT8 = "float8_e4m3fn", "int8"
_PACKED = "pack-quantized"
_FORMATS = ("float-quantized", "int-quantized", "naive-quantized", _PACKED)
_PACKED_BITS = (4, 8)
_SAY_NOTHING = (None, DENSE, "fakequant", *_FORMATS)
"""Formats that leave weights as they are where no group of them is quantized."""
_AS_TEXT = re.compile("([0-9]{1,10})x([0-9]{1,10})")  # a block, as older versions write it
_LARGEST = 2**31 - 1  # rows or columns of a block: beyond any matrix, and within 64 bits


@dataclass(frozen=True)
class ScaledForm:
    """How weights are stored: their dtype by torch's name, and what of a matrix shares a scale.

    No weight is in 8 bits where `stored` is None: caches alone have scales. Where `packed_bits` are
    said, integers of so many lie in int32, and are of the dtype once they are unpacked.
    """

    stored: str | None
    block: Block
    packed_bits: int | None = None


OF_CACHES_ALONE = ScaledForm(None, Block(None, None))


def scaled_form(config: Mapping[str, Any], layout: str = DENSE) -> ScaledForm | None:
    """Return how a `config.json` says that weights are stored in 8 bits.

    None of a plain model, and of one of this format, which `is_of_this_format` tells. Forms are
    those of Transformers' `FineGrainedFP8Config`, and of compressed-tensors. With `BITMASK` or
    `MARLIN`, which `sparse_layout` tells, they are those of what is there once the layout is
    undone. Raises `CheckpointError` for any other quantization.
    """
    said = _said(config)
    if said is None:
        return None
    if said.get("quant_method") == FP8:
        size = said.get("weight_block_size")
        if size is None:
            return ScaledForm(_FLOAT8, Block(None, None))
        return ScaledForm(_FLOAT8, _block(said, "weight_block_size", size))
    if not _is_of_compressed_tensors(said):
        rule = f"read are {QUANT_METHOD!r}, and 8 bits by {FP8!r} or {COMPRESSED_TENSORS!r}"
        raise said.problem("quant_method", repr(said.get("quant_method")), rule).as_error()
    key, found = _layout(said)
    if found != layout:
        problem = said.problem(key, repr(found), repr(layout))
        if found in (BITMASK, MARLIN):
            problem = replace(problem, remedy=_CONVERT)
        raise problem.as_error()
    if said.inside("transform_config").get("config_groups"):
        rule = "none: activations would have to be transformed as well"
        raise said.problem("transform_config", "transforms of weights", rule).as_error()
    if said.get("config_groups"):
        return _of_groups(said, layout)
    return OF_CACHES_ALONE if said.get("kv_cache_scheme") else None


def sparse_layout(config: Mapping[str, Any]) -> Any:
    """Return the layout in which a `config.json` says that weights are stored without their zeros.

    It is compressed-tensors', whether weights are quantized or not. None of all others, which
    `scaled_form` is for. Raises `CheckpointError` for entries that are no JSON objects.
    """
    said = _said(config)
    if said is None or not _is_of_compressed_tensors(said):
        return None
    _, layout = _layout(said)
    return None if layout == DENSE else layout


def _said(config: Mapping[str, Any]) -> QuantizationEntries | None:
    return None if is_of_this_format(config) else quantization_entries(config)


def _is_of_compressed_tensors(said: QuantizationEntries) -> bool:
    method = said.get("quant_method")
    if method is None:
        return any(key in said.entries for key in _OF_COMPRESSED_TENSORS)
    return method in (COMPRESSED_TENSORS, _EARLIER)


def _layout(said: QuantizationEntries) -> tuple[str, Any]:
    """The key that says how compressed-tensors stores zeros, and what it says."""
    sparsity = said.inside("sparsity_config")
    layout = sparsity.get("format") or DENSE
    if layout != DENSE:
        return "sparsity_config.format", layout
    if said.get("config_groups"):
        packed = any(found == MARLIN for _, found in _weight_groups(said))
        return "format", MARLIN if packed else DENSE  # others are those of quantized weights
    layout = said.get("format")
    if sparsity.entries or layout in _SAY_NOTHING:
        return "format", DENSE
    return "format", layout


def _weight_groups(said: QuantizationEntries) -> list[tuple[QuantizationEntries, Any]]:
    """The groups that quantize weights, each with its format."""
    groups = said.inside("config_groups")
    found = [groups.inside(key) for key in groups.entries]
    return [
        (group, group.get("format") or said.get("format"))
        for group in found
        if group.get("weights") is not None
    ]


def _of_groups(said: QuantizationEntries, layout: str) -> ScaledForm:
    """The form of a compressed-tensors checkpoint, which all of its groups share."""
    of_group = _of_marlin_group if layout == MARLIN else _of_group
    forms = [of_group(group, found) for group, found in _weight_groups(said)]
    if len(set(forms)) != 1:
        several = [f"{form.stored} in blocks of {list(form.block)}" for form in forms]
        rule = "weights of 8 bits, all in one form"
        value = " and ".join(several) or "no weights"
        raise said.problem("config_groups", value, rule).as_error()
    if layout == BITMASK and forms[0].packed_bits is not None:
        rule = f"weights of 8 bits each, with {BITMASK!r}"
        raise said.problem("format", repr(_PACKED), rule).as_error()
    return forms[0]


def _of_group(group: QuantizationEntries, layout: object) -> ScaledForm:
    """The form of a group; compressed-tensors has defaults for what is not said."""
    if layout not in _FORMATS:
        raise group.problem("format", repr(layout), f"one of {', '.join(_FORMATS)}").as_error()
    weights = group.inside("weights")
    if layout == _PACKED:
        return ScaledForm(_INT8, _of_strategy(weights), _packed_bits(group, weights))
    kind, bits = _kind(weights)
    if kind not in ("float", "int") or bits != 8:
        rule = "float or int of 8 bits"
        raise group.problem("weights", f"{kind} of {bits} bits", rule).as_error()
    return ScaledForm(_FLOAT8 if kind == "float" else _INT8, _of_strategy(weights))


def _of_marlin_group(group: QuantizationEntries, layout: object) -> ScaledForm:
    """The form of a group of `MARLIN`, whose numbers are int8 once the layout is undone."""
    if layout != MARLIN:
        raise group.problem("format", repr(layout), f"{MARLIN!r}, as of other groups").as_error()
    weights = group.inside("weights")
    _packed_bits(group, weights)
    block = _of_strategy(weights)
    if block.rows != 1:
        rule = "channel or group: a scale has one row"
        raise weights.problem("strategy", repr(weights.get("strategy")), rule).as_error()
    return ScaledForm(_INT8, block)


def _packed_bits(group: QuantizationEntries, weights: QuantizationEntries) -> int:
    """Bits of integers that lie in int32."""
    kind, bits = _kind(weights)
    if kind != "int" or bits not in _PACKED_BITS:
        rule = "int of 4 or 8 bits"
        raise group.problem("weights", f"{kind} of {bits} bits", rule).as_error()
    return int(bits)


def _kind(weights: QuantizationEntries) -> tuple[Any, Any]:
    """Type and bits of symmetric weights; compressed-tensors has defaults for what is not said."""
    if not weights.entries.get("symmetric", True):
        rule = "true: a weight is its value times a scale"
        raise weights.problem("symmetric", "false", rule).as_error()
    return _lower(weights.get("type") or "int"), weights.entries.get("num_bits", 8)


def _of_strategy(weights: QuantizationEntries) -> Block:
    strategy, size = _lower(weights.get("strategy")), weights.get("group_size")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "tensor":
        return Block(None, None)
    if strategy == "channel":
        return Block(1, None)
    if strategy == "group":
        return _block(weights, "group_size", [1, size])
    if strategy == "block":
        size = weights.get("block_structure")
        if isinstance(size, str) and (both := _AS_TEXT.fullmatch(size)):
            size = [int(both[1]), int(both[2])]
        return _block(weights, "block_structure", size)
    rule = "tensor, channel, group or block"
    raise weights.problem("strategy", repr(strategy), rule).as_error()


def _block(said: QuantizationEntries, key: str, size: object) -> Block:
    """Rows and columns, as a list of both."""
    if isinstance(size, list | tuple) and len(size) == 2:
        rows, columns = size
        whole = type(rows) is type(columns) is int
        if whole and 1 <= min(rows, columns) <= max(rows, columns) <= _LARGEST:
            return Block(rows, columns)
    rule = f"two whole numbers from 1 to {_LARGEST}, of rows and columns"
    raise said.problem(key, repr(size), rule).as_error()


def _lower(word: Any) -> Any:
    return word.lower() if isinstance(word, str) else word
