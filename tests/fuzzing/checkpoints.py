"""Targets that read a checkpoint: its configuration, index, checksums, files and layers."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import replace
from functools import cache

import torch

from permllm_vllm import ops
from permllm_vllm.backends import Backend, CheckpointWeights
from permllm_vllm.backends.cpu import CpuBackend, instruction_sets
from permllm_vllm.backends.reference import ReferenceBackend
from permllm_vllm.checkpoint.checksums import CHECKSUMS_NAME, read_checksums
from permllm_vllm.checkpoint.int4 import stored_values
from permllm_vllm.checkpoint.layer import SparseLayer
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.reader import CheckpointReader
from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.checkpoint.shard import DTYPES, Shard
from permllm_vllm.checkpoint.shards import INDEX_NAME, read_json, read_weight_map
from permllm_vllm.checkpoint.validation import validate
from tests.fuzzing import place, plain
from tests.fuzzing.choices import ODD_VALUES, Choices, damaged_bytes, damaged_json, encoded
from tests.fuzzing.outcome import Finding, Refused, refusing
from tests.fuzzing.plain import Stored
from tests.fuzzing.samples import DOWN, SAMPLES, UP, Sample

CONFIG, FILE = "config.json", "model.safetensors"
KINDS = (*plain.SPARSE, "bias", "weight")


def config(data: bytes) -> None:
    """config.json: damaged values, keys and bytes."""
    choices = Choices(data)
    document = damaged_json(choices, choices.pick(SAMPLES).config, choices.below(4))
    raw = choices.once_in(4)
    text = damaged_bytes(choices, encoded(document), choices.below(3) if raw else 0)
    path = place.write(CONFIG, text) / CONFIG
    try:
        content = refusing(lambda: read_json(path))
        entries = content.get("quantization_config")
        found = refusing(lambda: QuantizationConfig.from_dict(entries))  # type: ignore[arg-type]
    except Refused:
        if not raw:
            expect_broken_config(json.loads(text))
        return
    if raw:
        return  # expressions may differ from Python's
    try:
        expected = plain.read_config(json.loads(text))
    except plain.Broken:
        raise Finding(f"a broken configuration was accepted: {found.to_dict()}") from None
    if found.to_dict() != expected:
        raise Finding(f"{expected} was read as {found.to_dict()}")
    for name in ("lm_head", "model.layers.0.mlp.gate", "model.norm"):
        if found.is_ignored(name) != plain.ignored(expected, name):
            raise Finding(f"{name} against {expected['ignore']}")


def expect_broken_config(content: object) -> None:
    """Refusing is right unless the format allows it."""
    try:
        entries = plain.read_config(content)
    except plain.Broken:
        return
    raise Finding(f"refused, and it is valid: {entries}")


def index(data: bytes) -> None:
    """model.safetensors.index.json: damaged names of tensors and files."""
    choices = Choices(data)
    names = [f"model.layers.{i}.weight" for i in range(3)]
    document = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "a.safetensors")}
    raw = choices.once_in(4)
    damaged = damaged_json(choices, document, choices.below(4))
    text = damaged_bytes(choices, encoded(damaged), choices.below(3) if raw else 0)
    directory = place.write(INDEX_NAME, text)
    try:
        found = refusing(lambda: read_weight_map(directory))
    except Refused:
        if damaged == document and not raw:
            raise Finding("an undamaged index was refused") from None
        return
    finally:
        place.remove(INDEX_NAME)
    if found != json.loads(text)["weight_map"]:
        raise Finding(f"the index was read as {found}")
    for file in found.values():
        if "/" in file or "\\" in file or file.startswith(".") or not file.isprintable():
            raise Finding(f"{file!r} is no file of the checkpoint's directory")


def checksums(data: bytes) -> None:
    """SHA256SUMS: damaged lines, names and bytes."""
    choices = Choices(data)
    lines = [f"{i:064x}  model-{i}.safetensors" for i in range(choices.below(4))]
    if lines and choices.once_in(2):
        name = str(choices.pick(ODD_VALUES)).encode("utf-8", "replace").decode()
        lines[choices.below(len(lines))] = f"{1:064x} {choices.pick((' ', '*', ''))}{name}"
    content = damaged_bytes(choices, "\n".join(lines).encode(), choices.below(4))
    directory = place.write(CHECKSUMS_NAME, content)
    try:
        expected = plain.read_checksums(text_of(content))
    except (plain.Broken, UnicodeDecodeError):
        expected = None
    try:
        found = refusing(lambda: read_checksums(directory))
    except Refused:
        if expected is not None:
            raise Finding(f"refused, and it is valid: {expected}") from None
        return
    finally:
        place.remove(CHECKSUMS_NAME)
    if found != expected:
        raise Finding(f"{expected} was read as {found}")


def text_of(content: bytes) -> str:
    """As a text file is read: every kind of line end is one."""
    return content.decode().replace("\r\n", "\n").replace("\r", "\n")


def file(data: bytes) -> None:
    """model.safetensors: damaged bytes and a damaged header."""
    choices = Choices(data)
    content = choices.pick(SAMPLES).file()
    undamaged = content
    if choices.once_in(2):
        (length,) = struct.unpack_from("<Q", content)
        header = damaged_json(choices, json.loads(content[8 : 8 + length]), choices.below(4))
        text = encoded(header)
        content = struct.pack("<Q", len(text)) + text + content[8 + length :]
    content = damaged_bytes(choices, content, choices.below(4))
    path = place.write(FILE, content) / FILE
    try:
        shard = refusing(lambda: Shard(path))
        tensors = {name: refusing(lambda n=name: shard.tensor(n)) for name in shard.headers}  # type: ignore[misc]
    except Refused:
        if content == undamaged:
            raise Finding("an undamaged file was refused") from None
        return
    expected = plain.read_file(content)
    if tensors.keys() != expected.keys():
        raise Finding(f"{sorted(expected)} was read as {sorted(tensors)}")
    for name, tensor in tensors.items():
        if (
            list(tensor.shape) != expected[name].shape
            or raw_bytes(tensor) != expected[name].content
        ):
            raise Finding(f"{name}: other bytes or shape than in the file")


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def layers(data: bytes) -> None:
    """A whole checkpoint: damaged masks, permutations, scales, values, shapes, dtypes, names."""
    choices = Choices(data)
    sample = damaged_sample(choices, choices.pick(SAMPLES))
    config_bytes, file_bytes = encoded(sample.config), sample.file()
    place.write(CONFIG, config_bytes)
    directory = place.write(FILE, file_bytes)
    try:
        expected = plain.read(config_bytes, file_bytes)
    except plain.Broken:
        expected = None
    problems = validate(directory)
    if expected is None:
        if not problems:
            raise Finding("a broken checkpoint was found valid")
        return
    if problems:
        raise Finding(f"a valid checkpoint was refused: {problems[0]}")
    reader = CheckpointReader(directory)
    quantization = reader.quantization
    assert quantization is not None
    for module, rows in expected.items():
        layer = reader.layer(module)
        pattern, block = Pattern.parse(quantization.pattern), quantization.block_size
        dense = layer.dense(pattern, block)
        if dense.float().tolist() != rows:
            raise Finding(f"{module} was read as another weight")
        served(layer, pattern, block, dense, choices.pick(backends()))


def contents(data: bytes) -> None:
    """One layer in memory: damaged masks, permutations, scales and values, then served."""
    choices = Choices(data)
    sample = choices.pick(SAMPLES)
    entries = sample.config["quantization_config"]
    module = choices.pick((UP, DOWN)).format(0)
    kinds = [name.rpartition(".")[2] for name in sample.tensors if name.startswith(f"{module}.")]
    stored = {kind: sample.tensors[f"{module}.{kind}"] for kind in kinds}
    for _ in range(choices.below(3)):
        kind = choices.pick(kinds)
        changed = changed_content(choices, kind, bytearray(stored[kind].content), choices.below(3))
        stored[kind] = replace(stored[kind], content=changed)
    layer = as_layer(module, stored)
    pattern, block = Pattern.parse(entries["pattern"]), entries["block_size"]
    try:
        expected = plain.read_layer(entries, module, stored, canonical=False)
    except plain.Broken:
        expected = None
    try:
        dense = refusing(lambda: layer.dense(pattern, block))
    except Refused:
        if expected is not None:
            raise Finding("a valid layer was refused") from None
        return
    if expected is None:
        raise Finding("a broken layer was accepted")
    if dense.float().tolist() != expected:
        raise Finding(f"{module} was read as another weight")
    served(layer, pattern, block, dense, choices.pick(backends()))


def as_layer(module: str, stored: dict[str, Stored]) -> SparseLayer:
    """The tensors without a file between."""

    def tensor(kind: str) -> torch.Tensor | None:
        return as_tensor(stored[kind]) if kind in stored else None

    values, mask = tensor("weight_packed"), tensor("weight_mask")
    assert values is not None
    assert mask is not None
    multipliers = tensor("weight_multiplier")
    return SparseLayer(
        stored_values(values, multipliers), mask, tensor("input_permutation"),
        tensor("folded_permutation"), tensor("weight_scale"), tensor("bias"), module, multipliers,
    )  # fmt: skip


def as_tensor(stored: Stored) -> torch.Tensor:
    dtype = DTYPES[stored.dtype]
    if not stored.content:
        return torch.empty(stored.shape, dtype=dtype)
    return torch.frombuffer(bytearray(stored.content), dtype=dtype).view(stored.shape)


@cache
def backends() -> list[Backend]:
    """Every one that runs on this machine."""
    return [ReferenceBackend(torch.bfloat16), *map(CpuBackend, instruction_sets())]


def served(
    layer: SparseLayer, pattern: Pattern, block: int, dense: torch.Tensor, backend: Backend
) -> None:
    """What kernels make of a layer: unit inputs read its weight back."""
    values = layer.values if layer.scale is not None else layer.values.bfloat16()
    weights = CheckpointWeights(
        values, layer.mask, layer.input_permutation, layer.scale, pattern, block
    )
    rows, columns = dense.shape
    inputs = torch.eye(columns, dtype=torch.bfloat16)
    packed = backend.pack(weights)
    y = ops.sparse_linear(
        inputs, packed.packed, packed.metadata, packed.permutation, packed.scale, None, rows,
        str(pattern),
    )  # fmt: skip
    if not right_weight(y.t(), dense, torch.bfloat16, packed.scale):
        raise Finding(f"{layer.name} is served as another weight by {backend.instruction_set}")


def right_weight(
    found: torch.Tensor, dense: torch.Tensor, held: torch.dtype, scale: torch.Tensor | None
) -> bool:
    """Whether a weight that was read back by unit inputs is `dense`, as a kernel holds it."""
    if not bool((dense.abs() < 1e30).all()) or bool((dense[dense != 0].abs() < 1e-30).any()):
        return True  # products overflow, or kernels flush what is denormal
    if scale is not None:  # the kernel rounds the activations to int8 too
        return torch.allclose(found.float(), dense.float(), rtol=2**-6)
    return torch.equal(found.float(), dense.to(held).float())


def damaged_sample(choices: Choices, sample: Sample) -> Sample:
    """Up to three tensors or settings changed; the file itself stays a valid safetensors file."""
    for _ in range(choices.below(4)):
        name = choices.pick(list(sample.tensors) or ["none.weight_mask"])
        module, _, kind = name.rpartition(".")
        tensor = sample.tensors.get(name, Stored("U8", [0], b""))
        how = choices.below(8)
        if how < 3:
            changed = changed_content(choices, kind, bytearray(tensor.content), how)
            sample = sample.with_tensor(name, replace(tensor, content=changed))
        elif how == 3:
            sample = sample.with_tensor(name, reshaped(choices, tensor))
        elif how == 4:
            kept = {other: one for other, one in sample.tensors.items() if other != name}
            sample = replace(sample, tensors=kept)
        elif how == 5:
            target = choices.pick([module, "lm_head", "model.layers.7.mlp.up_proj", "4", "x.5"])
            sample = sample.with_tensor(f"{target}.{choices.pick(KINDS)}", tensor)
        elif how == 6:
            others = list(sample.tensors.values()) or [tensor]
            sample = sample.with_tensor(name, choices.pick(others))
        else:
            entries = damaged_json(choices, sample.config["quantization_config"], 1)
            sample = replace(sample, config={**sample.config, "quantization_config": entries})
    return sample


def changed_content(choices: Choices, kind: str, content: bytearray, how: int) -> bytes:
    """Bits flipped, bytes set to what matters for the kind, or two bytes exchanged."""
    if not content:
        return b""
    at, other = choices.below(len(content)), choices.below(len(content))
    if how == 0:
        content[at] ^= 1 << choices.below(8)
    elif how == 1:
        content[at] = choices.pick((0, 1, 31, 32, 63, 64, 127, 128, 255, 0x33, 0x0F, 0x7F, 0xF0))
        if kind in ("weight_packed", "weight_scale") and at + 1 < len(content):
            content[at + 1] = choices.pick((0x7F, 0x80, 0xFF, 0x7C, 0))
    else:
        content[at], content[other] = content[other], content[at]
    return bytes(content)


def reshaped(choices: Choices, tensor: Stored) -> Stored:
    """Another dtype, shape or size that the header may still state."""
    size = plain.BYTES[tensor.dtype]
    count = len(tensor.content) // size
    how = choices.below(4)
    if how == 0:
        same = [dtype for dtype, other in plain.BYTES.items() if other == size]
        return replace(tensor, dtype=choices.pick(same))
    if how == 1:
        return replace(tensor, shape=choices.pick([[count], [1, count], [count, 1], [1, 1, count]]))
    if how == 2:
        return replace(tensor, shape=list(reversed(tensor.shape)))
    rows = choices.below(4)
    row = size * math.prod(tensor.shape[1:])
    content = (tensor.content or bytes(row)) * 3  # nothing is left of what had no rows before
    return Stored(tensor.dtype, [rows, *tensor.shape[1:]], content[: rows * row])
