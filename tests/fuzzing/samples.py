"""Small valid checkpoints as plain data, made without the package."""

from __future__ import annotations

import json
import math
import random
import struct
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzzing.plain import BYTES, VALUE_DTYPES, Stored

UP, DOWN = "model.layers.{}.mlp.up_proj", "model.layers.{}.mlp.down_proj"


@dataclass(frozen=True)
class Sample:
    """A parsed config.json, and the tensors in the order of the file."""

    config: dict[str, Any]
    tensors: dict[str, Stored]

    @property
    def value_dtype(self) -> str:
        return str(self.config["quantization_config"]["value_dtype"])

    def with_tensor(self, name: str, tensor: Stored) -> Sample:
        return replace(self, tensors=self.tensors | {name: tensor})

    def file(self) -> bytes:
        """The safetensors file."""
        header, start = {}, 0
        for name, tensor in self.tensors.items():
            end = start + len(tensor.content)
            header[name] = {
                "dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, end]
            }  # fmt: skip
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        content = b"".join(tensor.content for tensor in self.tensors.values())
        return struct.pack("<Q", len(text)) + text + content


def sample(
    pattern: str, value_dtype: str, block: int, layers: int, columns: int, seed: int,
    *, tiny: bool = False,
) -> Sample:  # fmt: skip
    """Sparse up and down projections; up is permuted at run time, down folded, where blocks fit."""
    shuffle = random.Random(seed)
    modules = [name.format(i) for i in range(layers) for name in (UP, DOWN)]
    permuted = columns % block == 0
    runtime, folded = (modules[::2], modules[1::2]) if permuted else ([], [])
    config = {
        "model_type": "llama",
        "quantization_config": entries(pattern, value_dtype, block, runtime, folded),
    }
    tensors = {"model.norm.weight": Stored("F32", [2], struct.pack("<2f", 1, 2))}
    for number, module in enumerate(modules):
        rows = shuffle.randint(1, 3)
        tensors |= weights(module, rows, columns, pattern, value_dtype, shuffle, tiny=tiny)
        if permuted:
            kind = "folded_permutation" if number % 2 else "input_permutation"
            tensors[f"{module}.{kind}"] = permutation(columns, block, pattern, shuffle)
        if number % 2:
            tensors[f"{module}.bias"] = values([rows], "F32", shuffle)
    return Sample(config, tensors)


def entries(
    pattern: str, value_dtype: str, block: int, runtime_permuted: list[str], folded: list[str]
) -> dict[str, Any]:
    """A quantization_config."""
    return {
        "quant_method": "permllm",
        "format_version": 2 if value_dtype == "int4" else 1,
        "pattern": pattern,
        "block_size": block,
        "value_dtype": value_dtype,
        "ignore": ["lm_head", r"re:.*\.gate"],
        "runtime_permuted": runtime_permuted,
        "folded": folded,
        "tool_version": "0",
    }


def weights(
    module: str, rows: int, columns: int, pattern: str, value_dtype: str, shuffle: random.Random,
    *, tiny: bool = False,
) -> dict[str, Stored]:  # fmt: skip
    """Values, mask and, for integers, scales and multipliers of a layer."""
    kept, group = map(int, pattern.split(":"))
    dtype, each = VALUE_DTYPES[value_dtype], columns * kept // group
    if value_dtype == "int4":
        each //= 2
    masks = bytes(mask_byte(kept, group, shuffle) for _ in range(rows * columns // 8))
    tensors = {
        f"{module}.weight_packed": values([rows, each], dtype, shuffle, tiny=tiny),
        f"{module}.weight_mask": Stored("U8", [rows, columns // 8], masks),
    }
    if value_dtype == "int4":
        shape = [rows, math.ceil(columns / 64)]
        content = bytes(shuffle.randint(1, 16) for _ in range(math.prod(shape)))
        tensors[f"{module}.weight_multiplier"] = Stored("U8", shape, content)
    if value_dtype in ("int8", "int4"):
        scale = struct.pack(f"<{rows}f", *(shuffle.uniform(0.1, 1) for _ in range(rows)))
        tensors[f"{module}.weight_scale"] = Stored("F32", [rows], scale)
    return tensors


def permutation(columns: int, block: int, pattern: str, shuffle: random.Random) -> Stored:
    group = int(pattern.partition(":")[2])
    content = b"".join(canonical(block, group, shuffle) for _ in range(columns // block))
    return Stored("U8", [columns], content)


def values(shape: list[int], dtype: str, shuffle: random.Random, *, tiny: bool = False) -> Stored:
    """Any numbers below 2, zeros of both signs among them; those that kernels flush if `tiny`."""
    content = bytearray(shuffle.randbytes(math.prod(shape) * BYTES[dtype]))
    if dtype not in ("I8", "U8"):
        high = BYTES[dtype] - 1
        for at in range(high, len(content), high + 1):
            content[at] &= 0xBF  # below 2 whatever the rest
            if dtype != "F16" and not tiny:
                content[at] |= 0x20  # 1e-19 or more
        content[: high + 1] = bytes(high) + b"\x80"
    return Stored(dtype, shape, bytes(content))


def mask_byte(kept: int, group: int, shuffle: random.Random) -> int:
    chosen = [first + j for first in range(0, 8, group) for j in shuffle.sample(range(group), kept)]
    return sum(1 << bit for bit in chosen)


def canonical(block: int, group: int, shuffle: random.Random) -> bytes:
    entries = shuffle.sample(range(block), block)
    groups = sorted(sorted(entries[i : i + group]) for i in range(0, block, group))
    return bytes(entry for one in groups for entry in one)


NORMAL = [
    sample("2:4", "bfloat16", 32, 1, 32, 0),
    sample("2:4", "float32", 32, 1, 64, 1),
    sample("4:8", "float16", 32, 1, 32, 2),
    sample("2:4", "int8", 32, 1, 32, 3),
    sample("4:8", "bfloat16", 64, 1, 64, 4),
    sample("2:4", "bfloat16", 32, 2, 32, 5),
    sample("2:4", "float16", 64, 1, 24, 6),
    sample("4:8", "int8", 128, 1, 128, 7),
    sample("2:4", "int4", 32, 1, 96, 9),
]
SAMPLES = [*NORMAL, sample("2:4", "bfloat16", 32, 1, 32, 8, tiny=True)]
