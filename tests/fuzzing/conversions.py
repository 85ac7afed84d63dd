"""Targets that read what another tool pruned: a bitmask checkpoint, and zeros in any order."""

from __future__ import annotations

import random
import struct
from dataclasses import replace
from functools import cache

import torch

from permllm_offline.conversion.bitmask import BitmaskFiles
from permllm_offline.conversion.recovery import recover_permutation
from permllm_offline.conversion.without_zeros import WeightsWithoutZeros
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.stored_files import StoredFiles
from tests.fuzzing import place, plain
from tests.fuzzing.checkpoints import FILE, changed_content, raw_bytes, reshaped
from tests.fuzzing.choices import Choices
from tests.fuzzing.outcome import Finding, Refused, refusing
from tests.fuzzing.plain import Stored
from tests.fuzzing.samples import Sample, mask_byte, values

NUMBERS = (0, 1, -1, 2, 3, 8, 12, 16, 2**31, 2**32, 2**40, 2**62, 2**63 - 1, -(2**63))
NAMES = ("weight", "compressed", "bitmask", "shape", "bias")
ROWS, BLOCK, BLOCKS = 48, 32, 2  # of the zeros in any order; rows enough to find every group


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
        weights = WeightsWithoutZeros(files, None, torch.bfloat16)
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


def recovery(data: bytes) -> None:
    """Kept sets in a hidden order, bits of which are flipped: the order is right or refused."""
    choices = Choices(data)
    pattern = Pattern(*choices.pick(((2, 4), (4, 8))))
    rows = choices.pick((ROWS, 0, 1, 3, 20, 34))
    shuffle = random.Random(choices.below(2**16))
    kept = hidden(pattern, rows, shuffle)
    flips = choices.below(4)
    for _ in range(flips if rows else 0):
        row, column = choices.below(rows), choices.below(BLOCK * BLOCKS)
        kept[row][column] = choices.once_in(2)
    ties = torch.zeros(BLOCKS, dtype=torch.int64) if choices.once_in(4) else None
    flags = torch.tensor(kept, dtype=torch.bool).view(rows, BLOCK * BLOCKS)
    found = recover_permutation(flags, pattern, BLOCK, ties)
    if found is None:
        if rows == ROWS and flips == 0 and ties is None:
            raise Finding("an order that every row obeys was not found")
        return
    local = found.tolist()
    if ties is not None and local[:BLOCK] != local[BLOCK:]:
        raise Finding("tied blocks got different orders")
    for start in range(0, BLOCK * BLOCKS, BLOCK):
        order = local[start : start + BLOCK]
        if sorted(order) != list(range(BLOCK)):
            raise Finding(f"{order} is no permutation")
        for first in range(0, BLOCK, pattern.group):
            group = [start + entry for entry in order[first : first + pattern.group]]
            if any(sum(row[channel] for channel in group) > pattern.kept for row in kept):
                raise Finding(f"channels {group} keep more than {pattern}")


def hidden(pattern: Pattern, rows: int, shuffle: random.Random) -> list[list[bool]]:
    """Rows that obey the pattern in an order of each block that nobody wrote down."""
    orders = [shuffle.sample(range(BLOCK), BLOCK) for _ in range(BLOCKS)]
    kept = []
    for _ in range(rows):
        row = [False] * (BLOCK * BLOCKS)
        for number, order in enumerate(orders):
            for first in range(0, BLOCK, pattern.group):
                group = order[first : first + pattern.group]
                for entry in shuffle.sample(group, pattern.kept):
                    row[number * BLOCK + entry] = True
        kept.append(row)
    return kept
