"""The format once more, in plain Python from docs/checkpoint-format.md: what an input means.

Shares no code with `permllm_vllm`. `read` is as lenient as JSON and safetensors can be; it gives an
answer only where every rule is kept.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

KEYS = {
    "quant_method", "format_version", "pattern", "block_size", "value_dtype", "ignore",
    "runtime_permuted", "folded", "tool_version",
}  # fmt: skip
VALUE_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "int8": "I8", "int4": "U8"}
BYTES = {"BF16": 2, "F16": 2, "F32": 4, "I8": 1, "U8": 1, "F64": 8, "I64": 8, "I32": 4, "BOOL": 1}
SPARSE = (
    "weight_packed", "weight_mask", "input_permutation", "folded_permutation", "weight_scale",
    "weight_multiplier",
)  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in the file."""

    dtype: str
    shape: list[int]
    content: bytes

    def numbers(self) -> list[float]:
        """All elements, widened exactly."""
        size, content = BYTES[self.dtype], self.content
        count = len(content) // size
        if self.dtype == "BF16":
            words = struct.unpack(f"<{count}H", content)
            return list(
                struct.unpack(f"<{count}f", struct.pack(f"<{count}I", *(w << 16 for w in words)))
            )
        return list(
            struct.unpack(
                f"<{count}{ {'F16': 'e', 'F32': 'f', 'I8': 'b', 'U8': 'B'}[self.dtype] }", content
            )
        )


class Broken(Exception):
    """A rule of the format does not hold."""


def require(holds: object) -> None:
    if not holds:
        raise Broken


def read_config(content: Any) -> dict[str, Any]:
    """The `quantization_config` of a parsed config.json, if it is valid."""
    require(isinstance(content, dict))
    entries = content.get("quantization_config")
    require(isinstance(entries, dict) and set(entries) == KEYS)
    require(entries["quant_method"] == "permllm")
    version = 2 if entries["value_dtype"] == "int4" else 1
    require(type(entries["format_version"]) is int and entries["format_version"] == version)
    require(entries["pattern"] in ("2:4", "4:8"))
    require(type(entries["block_size"]) is int and entries["block_size"] in (32, 64, 128))
    require(isinstance(entries["value_dtype"], str) and entries["value_dtype"] in VALUE_DTYPES)
    require(isinstance(entries["tool_version"], str))
    for key in ("ignore", "runtime_permuted", "folded"):
        require(isinstance(entries[key], list))
        require(all(isinstance(entry, str) for entry in entries[key]))
    for entry in entries["ignore"]:
        require(not entry.startswith("re:") or usable(entry[3:]))
    for key in ("runtime_permuted", "folded"):
        require(len(set(entries[key])) == len(entries[key]))
    require(not set(entries["runtime_permuted"]) & set(entries["folded"]))
    return entries


def read_file(content: bytes) -> dict[str, Stored]:
    """The tensors of a safetensors file that is known to be one."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__", None)
    start = 8 + length
    stored = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        tensor = Stored(entry["dtype"], entry["shape"], content[start + begin : start + end])
        require(
            tensor.dtype not in BYTES
            or len(tensor.content) == end - begin == math.prod(tensor.shape) * BYTES[tensor.dtype]
        )
        stored[name] = tensor
    return stored


def usable(regex: str) -> bool:
    """Of the expressions that the fuzzer draws, those without look-around that Python takes."""
    try:
        re.compile(regex)
    except (re.error, OverflowError, RecursionError):
        return False
    return "(?" not in regex and len(regex) <= 300


def ignored(entries: dict[str, Any], module: str) -> bool:
    return any(
        re.fullmatch(entry[3:], module) is not None if entry.startswith("re:") else entry == module
        for entry in entries["ignore"]
    )


def read(config: bytes, file: bytes) -> dict[str, list[list[float]]]:
    """The dense weight of every sparse layer, row by row; raises `Broken`."""
    entries = read_config(json.loads(config))
    stored = read_file(file)
    modules: dict[str, dict[str, Stored]] = {}
    for name in stored:
        module, _, kind = name.rpartition(".")
        if kind in SPARSE:
            modules[module] = {}
    require(modules)
    for name, tensor in stored.items():
        for module, tensors in modules.items():
            if name.startswith(module + "."):
                tensors[name[len(module) + 1 :]] = tensor
    for key in ("runtime_permuted", "folded"):
        require(set(entries[key]) <= set(modules))
    require_whole_stacks(entries, stored, modules)
    return {module: read_layer(entries, module, tensors) for module, tensors in modules.items()}


def require_whole_stacks(
    entries: dict[str, Any], stored: dict[str, Stored], modules: dict[str, Any]
) -> None:
    """Rule 5: sparse in one decoder layer, sparse or ignored in all."""

    def place(name: str) -> tuple[str, str, str] | None:
        numbers = [part for part in name.split(".") if re.fullmatch("[0-9]+", part)]
        if len(numbers) != 1:
            return None
        before, after = re.split(rf"(?:^|(?<=\.)){numbers[0]}(?:$|(?=\.))", name, maxsplit=1)
        return before, numbers[0], after

    for module in modules:
        here = place(module)
        for name in stored if here is not None else ():
            other = place(name)
            if other is not None and other[0] == here[0]:
                twin = here[0] + other[1] + here[2]
                require(twin in modules or ignored(entries, twin))


def read_layer(
    entries: dict[str, Any], module: str, tensors: dict[str, Stored], *, canonical: bool = True
) -> list[list[float]]:
    """Rules 3, 4 and 6 for one layer; `canonical` asks for the one order of a permutation."""
    kept, group = map(int, entries["pattern"].split(":"))
    block, int4 = entries["block_size"], entries["value_dtype"] == "int4"
    scaled = int4 or entries["value_dtype"] == "int8"
    require(not ignored(entries, module))
    require(set(tensors) <= {*SPARSE, "bias"})
    require("weight_packed" in tensors and "weight_mask" in tensors)
    require(("weight_scale" in tensors) == scaled)
    require(("weight_multiplier" in tensors) == int4)
    require(("input_permutation" in tensors) == (module in entries["runtime_permuted"]))
    require(("folded_permutation" in tensors) == (module in entries["folded"]))
    require(len(tensors["weight_mask"].shape) == 2)
    rows, columns = tensors["weight_mask"].shape[0], tensors["weight_mask"].shape[1] * 8
    require(rows > 0 and columns > 0)
    shapes = {
        "weight_packed": [rows, columns * kept // group // (2 if int4 else 1)],
        "weight_mask": [rows, columns // 8],
        "input_permutation": [columns],
        "folded_permutation": [columns],
        "weight_scale": [rows],
        "weight_multiplier": [rows, math.ceil(columns / 64)],
        "bias": [rows],
    }
    dtypes = {
        "weight_packed": [VALUE_DTYPES[entries["value_dtype"]]],
        "weight_scale": ["F32"],
        "bias": ["BF16", "F16", "F32"],
    }
    for kind, tensor in tensors.items():
        require(tensor.shape == shapes[kind] and tensor.dtype in dtypes.get(kind, ["U8"]))
    place = list(range(columns))
    for kind in ("input_permutation", "folded_permutation"):
        if kind in tensors:
            require_permutation(tensors[kind].content, block, group if canonical else 1)
            if kind == "input_permutation":
                place = [
                    j // block * block + entry for j, entry in enumerate(tensors[kind].content)
                ]
    for kind in ("weight_packed", "bias", "weight_scale"):
        require(kind not in tensors or all(map(math.isfinite, tensors[kind].numbers())))
    scale = tensors["weight_scale"].numbers() if scaled else [1.0] * rows
    require(all(number > 0 for number in scale))
    values = tensors["weight_packed"].numbers()
    if int4:
        values = four_bits(tensors, rows)
    return dense_rows(tensors, values, rows, columns, kept, group, place, scale)


def four_bits(tensors: dict[str, Stored], rows: int) -> list[float]:
    """int4 values of all rows, times their multipliers."""
    packed, multipliers = (tensors[kind].content for kind in ("weight_packed", "weight_multiplier"))
    require(all(1 <= multiplier <= 16 for multiplier in multipliers))
    values = []
    for row in range(rows):
        octets = packed[row * len(packed) // rows : (row + 1) * len(packed) // rows]
        own = multipliers[row * len(multipliers) // rows : (row + 1) * len(multipliers) // rows]
        for i in range(2 * len(octets)):
            half = octets[i // 2] >> 4 if i % 2 else octets[i // 2] % 16
            values.append(float((half - 8) * own[i // 32]))
    return values


def read_bitmask(file: bytes) -> dict[str, Stored]:
    """The dense tensors of a sparse-24-bitmask file that is known to be a safetensors file."""
    stored = read_file(file)
    parts = {name: name.rpartition(".") for name in stored}
    modules = {part[0] for part in parts.values() if part[2] in ("compressed", "bitmask")}
    dense = {
        name: tensor
        for name, tensor in stored.items()
        if parts[name][0] not in modules or parts[name][2] not in ("compressed", "bitmask", "shape")
    }
    for module in modules:
        require(all(f"{module}.{kind}" in stored for kind in ("compressed", "bitmask", "shape")))
        require(f"{module}.weight" not in stored)
        shape = stored[f"{module}.shape"]
        require(shape.dtype in ("I64", "I32") and math.prod(shape.shape) == 2)
        code = {"I64": "q", "I32": "i"}[shape.dtype]
        rows, columns = struct.unpack(f"<2{code}", shape.content)
        require(rows > 0 and columns > 0 and columns % 8 == 0)
        values, mask = stored[f"{module}.compressed"], stored[f"{module}.bitmask"]
        require(values.shape == [rows, columns // 2] and mask.shape == [rows, columns // 8])
        require(mask.dtype == "U8")
        dense[f"{module}.weight"] = Stored(
            values.dtype, [rows, columns], bitmask_rows(values, mask, rows, columns)
        )
    # A weight of 8 bits has a scale, and what is stored here has none.
    weights = (one for name, one in dense.items() if name.endswith(".weight"))
    require(all(one.dtype not in ("I8", "U8") for one in weights))
    return dense


def bitmask_rows(values: Stored, mask: Stored, rows: int, columns: int) -> bytes:
    """The bytes of a matrix; every row keeps half of its channels."""
    size, at, found = BYTES[values.dtype], 0, b""
    for row in range(rows):
        bits = mask.content[row * columns // 8 : (row + 1) * columns // 8]
        kept = [bits[j // 8] >> (j % 8) & 1 for j in range(columns)]
        require(all(sum(kept[at : at + 4]) == 2 for at in range(0, columns, 4)))
        for bit in kept:
            found += values.content[at : at + size] if bit else bytes(size)
            at += size * bit
    return found


def read_checksums(text: str) -> dict[str, str]:
    """What a SHA256SUMS records, every file once."""
    recorded: dict[str, str] = {}
    for line in text.splitlines():
        digest, mark, name = line[:64], line[64:66], line[66:]
        require(len(digest) == 64 and set(digest) <= set("0123456789abcdef"))
        require(mark in ("  ", " *"))
        require(name.endswith(".safetensors") and name.isprintable() and len(name) <= 1000)
        require("/" not in name and "\\" not in name and not name.startswith("."))
        require(name not in recorded)
        recorded[name] = digest
    return recorded


def require_permutation(content: bytes, block: int, group: int) -> None:
    require(len(content) % block == 0)
    for start in range(0, len(content), block):
        entries = content[start : start + block]
        require(sorted(entries) == list(range(block)))
        groups = [list(entries[i : i + group]) for i in range(0, block, group)]
        require(group == 1 or groups == sorted(sorted(one) for one in groups))


def dense_rows(
    tensors: dict[str, Stored], numbers: list[float],
    rows: int, columns: int, kept: int, group: int,
    place: list[int], scale: list[float],
) -> list[list[float]]:  # fmt: skip
    mask, values = tensors["weight_mask"].content, iter(numbers)
    dense = []
    for row in range(rows):
        line = [0.0] * columns
        for first in range(0, columns, group):
            bits = [
                mask[row * columns // 8 + j // 8] >> (j % 8) & 1
                for j in range(first, first + group)
            ]
            require(sum(bits) == kept)
            for j, bit in zip(range(first, first + group), bits, strict=True):
                if bit:
                    line[place[j]] = float32(next(values) * scale[row])
        dense.append(line)
    return dense


def float32(number: float) -> float:
    """Rounded once, as a product in float32 is."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", number))[0])
    except OverflowError:
        return math.copysign(math.inf, number)
