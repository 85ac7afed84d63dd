"""The target that reads what another tool pruned: a bitmask checkpoint."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from functools import cache

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.sources import WeightSource
from permllm_vllm.checkpoint.stored_files import StoredFiles
from tests.fuzzing import place, plain
from tests.fuzzing.checkpoints import FILE, changed_content, raw_bytes, reshaped
from tests.fuzzing.choices import Choices
from tests.fuzzing.outcome import Finding, Refused, refusing
from tests.fuzzing.plain import Stored
from tests.fuzzing.samples import Sample, mask_byte, values

NUMBERS = (0, 1, -1, 2, 3, 8, 12, 16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
NAMES = ("weight", "compressed", "bitmask", "shape", "bias")


@cache
def bitmasks() -> list[Sample]:
    """Small checkpoints of two matrices and a norm."""
    found = []
    for seed, dtype in enumerate(("BF16", "F32", "F16")):
        shuffle = random.Random(seed)
        tensors = {"model.norm.weight": Stored("F32", [2], struct.pack("<2f", 1, 2))}
        for module in ("model.layers.0.a", "model.layers.0.b"):
            rows, columns = shuffle.randint(1, 3), shuffle.choice((8, 16, 24))
            masks = bytes(mask_byte(2, 4, shuffle) for _ in range(rows * columns // 8))
            tensors[f"{module}.compressed"] = values([rows, columns // 2], dtype, shuffle)
            tensors[f"{module}.bitmask"] = Stored("U8", [rows, columns // 8], masks)
            tensors[f"{module}.shape"] = Stored("I64", [2], struct.pack("<2q", rows, columns))
        found.append(Sample({}, tensors))
    return found


def bitmask(data: bytes) -> None:
    """compressed-tensors' sparse-24-bitmask: damaged shapes, masks, values, names, dtypes."""
    choices = Choices(data)
    sample = damaged_bitmask(choices, choices.pick(bitmasks()))
    content = sample.file()
    directory = place.write(FILE, content)
    try:
        expected = plain.read_bitmask(content)
    except plain.Broken:
        expected = None
    try:
        files = refusing(lambda: BitmaskFiles(StoredFiles(directory)))
        weights = WeightSource(files)
        names = weights.names()
        headers = {name: refusing(lambda n=name: weights.header(n)) for name in names}  # type: ignore[misc]
        tensors = {name: refusing(lambda n=name: weights.tensor(n)) for name in names}  # type: ignore[misc]
    except Refused:
        if expected is not None:
            raise Finding("a valid bitmask checkpoint was refused") from None
        return
    if expected is None:
        raise Finding("a broken bitmask checkpoint was accepted")
    if sorted(names) != sorted(expected):
        raise Finding(f"{sorted(expected)} was read as {names}")
    for name, tensor in tensors.items():
        if headers[name].shape != tuple(tensor.shape):
            raise Finding(f"{name} is announced as {headers[name]} and has {tuple(tensor.shape)}")
        one = expected[name]
        if list(tensor.shape) != one.shape or raw_bytes(tensor) != one.content:
            raise Finding(f"{name} was read as another weight")


def damaged_bitmask(choices: Choices, sample: Sample) -> Sample:
    """Up to three tensors changed, removed, doubled or exchanged."""
    for _ in range(choices.below(4)):
        name = choices.pick(list(sample.tensors) or ["none.bitmask"])
        module, _, kind = name.rpartition(".")
        tensor = sample.tensors.get(name, Stored("U8", [0], b""))
        how = choices.below(7)
        if how < 2:
            changed = changed_content(choices, kind, bytearray(tensor.content), choices.below(3))
            sample = sample.with_tensor(name, replace(tensor, content=changed))
        elif how == 2:
            sizes = choices.pick(NUMBERS), choices.pick(NUMBERS)
            dtype = choices.pick(("I64", "F32", "F64"))
            code = {"I64": "q", "F32": "f", "F64": "d"}[dtype]
            shape = choices.pick(([2], [1, 2], [2, 1], [2, 1, 1]))
            odd = Stored(dtype, shape, struct.pack(f"<2{code}", *sizes))
            sample = sample.with_tensor(f"{module}.shape", odd)
        elif how == 3:
            sample = sample.with_tensor(name, reshaped(choices, tensor))
        elif how == 4:
            kept = {other: one for other, one in sample.tensors.items() if other != name}
            sample = replace(sample, tensors=kept)
        elif how == 5:
            target = choices.pick((module, "lm_head", "weight"))
            sample = sample.with_tensor(f"{target}.{choices.pick(NAMES)}", tensor)
        else:
            others = list(sample.tensors.values()) or [tensor]
            sample = sample.with_tensor(name, choices.pick(others))
    return sample
