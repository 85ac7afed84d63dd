"""A target that reads models in 8 bits: what `config.json` says of them, weights and scales."""

from __future__ import annotations

import math
import random
import struct
from dataclasses import replace
from functools import cache
from typing import Any

from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.shards import read_json
from tests.fuzzing import place, plain, plain_forms
from tests.fuzzing.checkpoints import CONFIG, FILE, raw_bytes
from tests.fuzzing.choices import Choices
from tests.fuzzing.mutations import damaged_json, encoded
from tests.fuzzing.outcome import Finding, Refused, refusing
from tests.fuzzing.plain import Stored
from tests.fuzzing.samples import Sample

MLP, EXPERTS = "model.layers.0.mlp", "model.layers.0.mlp.experts"
SIZES = {
    "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I8": 1, "U8": 1, "F8_E5M2": 1,
    "F8_E8M0": 1,
}  # fmt: skip
NAMES = (
    f"{MLP}.up_proj.weight", f"{MLP}.up_proj.weight_scale", f"{MLP}.up_proj.weight_scale_inv",
    f"{MLP}.up_proj.weight_zero_point", f"{MLP}.up_proj.input_scale", f"{MLP}.any_scale",
    "model.layers.0.self_attn.k_cache.scale", "model.layers.0.self_attn.kv_scale", "any_scale",
    f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.gate_up_proj_scale_inv", f"{EXPERTS}.down_proj_scale",
    f"{EXPERTS}.up_proj", f"{EXPERTS}.up_proj_scale_inv", "model.norm.weight", "lm_head.table",
)  # fmt: skip


def groups(**weights: Any) -> dict[str, Any]:
    kind = weights.get("type", "float")
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": kind, **weights}}
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "config_groups": {"group_0": group},
    }


@cache
def samples() -> list[Sample]:
    """Small models of every form, a matrix and experts in each."""
    fine = {"quant_method": "fp8", "weight_block_size": [2, 4]}
    found = []
    for number, (entries, rows, columns, scale, suffix) in enumerate(
        (
            (fine, 2, 4, "F32", "_scale_inv"),
            ({"quant_method": "fp8"}, None, None, "BF16", "_scale_inv"),
            (groups(strategy="channel"), 1, None, "BF16", "_scale"),
            (groups(strategy="tensor", type="int"), None, None, "F16", "_scale"),
            (groups(strategy="group", group_size=3), 1, 3, "F32", "_scale"),
            (groups(strategy="block", block_structure=[4, 2]), 4, 2, "F32", "_scale"),
        )
    ):
        shuffle = random.Random(number)
        dtype = "I8" if entries.get("format") == "int-quantized" else "F8_E4M3"
        tensors = {"model.norm.weight": Stored("F32", [2], struct.pack("<2f", 1, 2))}
        shapes = {f"{MLP}.up_proj.weight": [5, 6], f"{EXPERTS}.gate_up_proj": [2, 8, 3]}
        for name, (*before, high, wide) in shapes.items():
            size = math.prod((*before, high, wide))
            codes = bytes(shuffle.choice((shuffle.randrange(0x7F), 0x80)) for _ in range(size))
            grid = [*before, -(-high // (rows or high)), -(-wide // (columns or wide))]
            factors = [shuffle.choice((0.5, 0.25, 1.5, -2.0)) for _ in range(math.prod(grid))]
            tensors[name] = Stored(dtype, [*before, high, wide], codes)
            tensors[name + suffix] = Stored(scale, grid, as_bytes(scale, factors))
        tensors[f"{MLP}.up_proj.input_scale"] = Stored("F32", [], struct.pack("<f", 2))
        found.append(Sample({"model_type": "llama", "quantization_config": entries}, tensors))
    return found


def as_bytes(dtype: str, numbers: list[float]) -> bytes:
    if dtype == "BF16":
        return b"".join(struct.pack("<f", number)[2:] for number in numbers)
    return struct.pack(f"<{len(numbers)}{'f' if dtype == 'F32' else 'e'}", *numbers)


def scaled(data: bytes) -> None:
    """Damaged entries of config.json, bytes, dtypes, shapes and names of weights and scales."""
    choices = Choices(data)
    sample = damaged_scaled(choices, choices.pick(samples()))
    content = sample.file()
    place.write(CONFIG, encoded(sample.config))
    directory = place.write(FILE, content)
    config = read_json(directory / CONFIG)
    try:
        expected = plain_forms.read(config, plain.read_file(content))
    except plain.Broken:
        expected = None
    try:
        reader = refusing(lambda: CheckpointReader(directory, experts_under="model.layers."))
        headers = {name: refusing(lambda n=name: reader.header(n)) for name in reader.names()}  # type: ignore[misc]
        tensors = {name: refusing(lambda n=name: reader.tensor(n)) for name in reader.names()}  # type: ignore[misc]
    except Refused:
        if expected is not None:
            raise Finding(f"a valid model in 8 bits was refused: {config}") from None
        return
    if expected is None:
        raise Finding(f"a broken model in 8 bits was accepted: {config}")
    if tensors.keys() != expected.keys():
        raise Finding(f"{sorted(expected)} was read as {sorted(tensors)}")
    for name, tensor in tensors.items():
        if headers[name] != (tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")):
            raise Finding(f"{name} is announced as {headers[name]} and is {tensor.dtype}")
        one = expected[name]
        if list(tensor.shape) != one.shape or raw_bytes(tensor) != one.content:
            raise Finding(f"{name} was read as another weight")


def damaged_scaled(choices: Choices, sample: Sample) -> Sample:
    """Up to three entries or tensors changed; the file stays a valid safetensors file."""
    for _ in range(choices.below(4)):
        name = choices.pick(list(sample.tensors) or ["none.weight"])
        tensor = sample.tensors.get(name, Stored("U8", [0], b""))
        how = choices.below(8)
        if how < 2:
            entries = damaged_json(choices, sample.config.get("quantization_config"), 1)
            sample = replace(sample, config={**sample.config, "quantization_config": entries})
        elif how == 2:
            sample = replace(sample, config=moved(choices, sample.config))
        elif how == 3:
            sample = sample.with_tensor(name, changed(choices, tensor))
        elif how == 4:
            same = [dtype for dtype, size in SIZES.items() if size == SIZES[tensor.dtype]]
            sample = sample.with_tensor(name, replace(tensor, dtype=choices.pick(same)))
        elif how == 5:
            sample = sample.with_tensor(name, reshaped(choices, tensor))
        elif how == 6:
            kept = {other: one for other, one in sample.tensors.items() if other != name}
            sample = replace(sample, tensors=kept)
        else:
            sample = sample.with_tensor(choices.pick(NAMES), tensor)
    return sample


def moved(choices: Choices, config: dict[str, Any]) -> dict[str, Any]:
    """The same entries elsewhere, or other ones beside them."""
    entries, others = config.get("quantization_config"), {"sparsity_config": {"format": "dense"}}
    rest = {key: one for key, one in config.items() if key != "quantization_config"}
    return choices.pick(
        (
            rest | {"compression_config": entries},
            rest | {"text_config": {"quantization_config": entries}},
            rest | {"compression_config": {"quantization_config": entries, **others}},
            rest | {"quantization_config": others},
            rest | {"quantization_config": others | {"kv_cache_scheme": {"num_bits": 8}}},
            rest,
        )
    )


def changed(choices: Choices, tensor: Stored) -> Stored:
    """One byte becomes what matters: no number, infinity, the largest, zeros of both signs."""
    content = bytearray(tensor.content)
    if content:
        content[choices.below(len(content))] = choices.pick((0x7F, 0xFF, 0x80, 0, 0x7E, 0x7C, 0xFE))
    return replace(tensor, content=bytes(content))


def reshaped(choices: Choices, tensor: Stored) -> Stored:
    """Another shape of as many elements, or fewer rows."""
    count = len(tensor.content) // SIZES[tensor.dtype]
    how = choices.below(4)
    if how == 3 and tensor.shape:
        rows = choices.below(tensor.shape[0] + 1)
        size = len(tensor.content) // max(tensor.shape[0], 1)
        return Stored(tensor.dtype, [rows, *tensor.shape[1:]], tensor.content[: rows * size])
    if how == 2:
        return replace(tensor, shape=[one for one in tensor.shape if one != 1])
    return replace(tensor, shape=[*reversed(tensor.shape)] if how else [1, count])
