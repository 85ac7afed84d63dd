"""Tiny models in `marlin-24`, written with plain loops: nothing here shares code with its reader.

That both read the layout rightly is tested on what compressed-tensors wrote.
"""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conversion.sparse_models import is_linear, set_config

Matrix = list[list[int]]


def write_marlin(
    source: Path, target: Path, back: Path, bits: int = 4, group: int | None = None
) -> None:
    """Store a checkpoint with 2:4 zeros so, and once more as the dense one that it stands for.

    Args:
        source: the checkpoint, of bfloat16.
        target: folder of that in integers.
        back: folder of the other.
        bits: of an integer.
        group: channels that share a scale; a whole row by default.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if not is_linear(name):
            stored[name] = plain[name] = tensor
            continue
        integers, scale = rounded(tensor, bits, group)
        module = name.removesuffix(".weight")
        kept, places = without_zeros(integers.tolist())
        stored[f"{module}.weight_packed"] = packed_integers(kept, bits)
        stored[f"{module}.meta"] = packed_places(places)
        stored[f"{module}.scale_packed"] = packed_scales(scale, tensor.shape[1])
        wide = scale.float().repeat_interleave(tensor.shape[1] // scale.shape[1], 1)
        plain[name] = (integers.float() * wide).to(torch.bfloat16)
    for folder, tensors in ((target, stored), (back, plain)):
        shutil.copytree(source, folder)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if group is None else "group",
        "group_size": group,
        "observer": "minmax",
    }
    set_config(
        target,
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "marlin-24",
            "quantization_status": "compressed",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
            },
            "ignore": ["lm_head"],
            "sparsity_config": {"format": "dense", "sparsity_structure": "2:4"},
        },
    )


def rounded(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Integers [out, in], and float16 scales [out, groups]; zeros stay zero."""
    parts = weight.float().unflatten(1, (-1, group or weight.shape[1]))
    scale = (parts.abs().amax(2) / (2 ** (bits - 1) - 0.5)).half()
    found = (parts / scale.float().unsqueeze(2)).round()
    return found.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).flatten(1).long(), scale


def without_zeros(integers: Matrix) -> tuple[Matrix, Matrix]:
    """Two kept integers and two places of each group of 4, zeros where it has fewer."""
    kept: Matrix = []
    places: Matrix = []
    for row in integers:
        kept.append([])
        places.append([])
        for start in range(0, len(row), 4):
            found = [place for place in range(4) if row[start + place]]
            zeros = [place for place in range(4) if place not in found]
            chosen = sorted(found + zeros[: 2 - len(found)])
            kept[-1] += [row[start + place] for place in chosen]
            places[-1] += chosen
    return kept, places


def packed_integers(kept: Matrix, bits: int) -> Tensor:
    """int32 [in / 32, out * 16 * bits / 32] of [out, in / 2]."""
    order = {4: [0, 2, 4, 6, 1, 3, 5, 7], 8: [0, 2, 1, 3]}[bits]
    words = []
    for first in range(0, len(kept[0]), 16):
        integers = []
        for block in range(0, len(kept), 64):
            for lane in range(32):
                for column in range(4):
                    held = []
                    for half in range(2):
                        row = block + lane // 8 * 16 + lane // 4 % 2 * 8 + half * 4 + column
                        line = kept[row][first + lane % 4 * 2 :]
                        held += [line[k] + 2 ** (bits - 1) for k in (0, 1, 8, 9)]
                    for start in range(0, 8, len(order)):
                        integers += [held[start + place] for place in order]
        each = 32 // bits
        words.append(
            [
                sum(one << bits * place for place, one in enumerate(integers[at : at + each]))
                for at in range(0, len(integers), each)
            ]
        )
    return torch.tensor(words, dtype=torch.int64).to(torch.uint32).view(torch.int32)


def packed_places(places: Matrix) -> Tensor:
    """int16 [in / 32, 2 * out] of [out, in / 2]."""
    rows, columns = len(places), len(places[0]) // 8
    found = [0] * (rows * columns)
    for i, line in enumerate(places):
        for j in range(columns):
            word = sum(place << 2 * at for at, place in enumerate(line[8 * j : 8 * j + 8]))
            row = i - i % 64 + i % 64 // 8 * 4 + i % 8 // 4 + i % 2 * 2 + (32 if i % 4 > 1 else 0)
            column = j
            if row % 2 == 0 and j % 2 == 1:
                row, column = row + 1, column - 1
            elif row % 2 == 1 and j % 2 == 0:
                row, column = row - 1, column + 1
            found[(column // 2 * rows + row) * 2 + column % 2] = word
    meta = torch.tensor(found, dtype=torch.int64).to(torch.uint16).view(torch.int16)
    return meta.view(columns // 2, rows * 2)


def packed_scales(scale: Tensor, channels: int) -> Tensor:
    """float16 [groups, out] of [out, groups]."""
    lines = scale.t().contiguous()
    groups = len(lines)
    if groups == 1 or channels // groups >= channels // 2:
        return lines
    for line in lines:
        before = line.clone()
        for start in range(0, len(line), 8):
            for place, at in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
                line[start + place] = before[start + at]
    return lines
