"""Tiny models in 8 bits with scales, as they are published, and the dense ones they stand for."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoint.plain_scaled import packed, quantized, restored

FINE: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
STATIC: dict[str, Any] = {
    "quant_method": "fp8",
    "activation_scheme": "static",
    "weight_block_size": None,
}


def compressed(kind: str, strategy: str, **said: object) -> dict[str, Any]:
    """What compressed-tensors says of 8 bits."""
    common = {"num_bits": 8, "type": kind, "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**common, "strategy": strategy, **said},
        "input_activations": {**common, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def packed_integers(bits: int, **said: object) -> dict[str, Any]:
    """What compressed-tensors says of integers in int32, of W4A16 for example."""
    weights = {"num_bits": bits, "type": "int", "symmetric": True, **said}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


@dataclass(frozen=True)
class Form:
    """What `config.json` says, rows and columns of a block (None: all), and how scales lie."""

    entries: dict[str, Any]
    rows: int | None
    columns: int | None
    dtype: torch.dtype = torch.float8_e4m3fn
    suffix: str = "weight_scale"
    scale_dtype: torch.dtype = torch.float32
    shape: Callable[[Tensor], Tensor] = lambda scale: scale
    of_activations: str = ""
    packed_bits: int | None = None


FORMS = {
    "fine": Form(FINE, 128, 128, suffix="weight_scale_inv"),
    "static": Form(
        STATIC,
        None,
        None,
        suffix="weight_scale_inv",
        scale_dtype=torch.bfloat16,  # as published
        shape=lambda scale: scale.reshape(()),
        of_activations="activation_scale",
    ),
    "channel": Form(compressed("float", "channel"), 1, None, scale_dtype=torch.bfloat16),
    "tensor": Form(
        compressed("float", "tensor"),
        None,
        None,
        shape=lambda scale: scale.reshape(1),
        of_activations="input_scale",
    ),
    "group": Form(compressed("float", "group", group_size=64), 1, 64),
    "block": Form(compressed("float", "block", block_structure=[128, 128]), 128, 128),
    "int8": Form(compressed("int", "channel"), 1, None, torch.int8),
    "int4": Form(
        packed_integers(4, strategy="group", group_size=64), 1, 64, torch.int8, packed_bits=4
    ),
}


def write_scaled(
    dense: Path,
    scaled: Path,
    back: Path,
    form: Form,
    is_scaled: Callable[[str], bool] = lambda name: "layers." in name and "_proj." in name,
    place: Callable[[dict[str, Any]], dict[str, Any]] = lambda config: config,
) -> None:
    """Write a dense checkpoint in 8 bits, and once more as the dense one that those stand for.

    Args:
        dense: the checkpoint.
        scaled: folder of that in 8 bits.
        back: folder of the other.
        form: of the 8 bits.
        is_scaled: which weights, by name, become 8 bits.
        place: the part of `config.json` that says so.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        if not name.endswith("weight") or tensor.dim() != 2 or not is_scaled(name):
            stored[name] = plain[name] = tensor
            continue
        rows, columns = form.rows or tensor.shape[0], form.columns or tensor.shape[1]
        found, scale = quantized(tensor, rows, columns, form.dtype, form.packed_bits or 8)
        scales = torch.tensor(scale).to(form.scale_dtype)
        module = name.removesuffix("weight")
        if form.packed_bits is None:
            stored[name] = found
        else:
            stored[f"{name}_packed"] = packed(found, form.packed_bits)
            stored[f"{name}_shape"] = torch.tensor(found.shape)
        stored[module + form.suffix] = form.shape(scales).clone()
        if form.of_activations:
            stored[module + form.of_activations] = torch.tensor(0.5)
        plain[name] = restored(found, scales.tolist(), rows, columns)
    for folder, tensors in ((scaled, stored), (back, plain)):
        shutil.copytree(dense, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((dense / "config.json").read_text())
    place(config)["quantization_config"] = form.entries
    (scaled / "config.json").write_text(json.dumps(config))


def add_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Store more in the one file of a checkpoint."""
    file = directory / "model.safetensors"
    save_file(load_file(file) | tensors, file, metadata={"format": "pt"})


def split_scales(directory: Path) -> None:
    """Store all scales in a file of their own, so that none lies beside its weight."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {name: f"part-{int('_scale' in name)}.safetensors" for name in tensors}
    for file in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == file}
        save_file(part, directory / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def fuse_scaled_experts(directory: Path, experts: str, count: int) -> None:
    """Store experts of float8 and their scales in two tensors each, matrices one after the other.

    Gate's rows must be whole blocks.
    """
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for joined, parts in {
        "gate_up_proj": ("gate_proj", "up_proj"),
        "down_proj": ("down_proj",),
    }.items():
        for kind, end in (("weight", ""), ("weight_scale_inv", "_scale_inv")):
            matrices = [
                torch.cat([_bytes(tensors.pop(f"{experts}.{n}.{part}.{kind}")) for part in parts])
                for n in range(count)
            ]
            dtype = torch.uint8 if kind == "weight" else torch.float32
            whole = torch.stack(matrices).view(dtype)
            tensors[f"{experts}.{joined}{end}"] = (
                whole.view(torch.float8_e4m3fn) if kind == "weight" else whole
            )
    save_file(tensors, file, metadata={"format": "pt"})


def _bytes(tensor: Tensor) -> Tensor:
    """Float8 as bytes, which can be joined."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
