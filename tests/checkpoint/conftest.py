"""A tiny checkpoint: two decoder layers, run-time and folded permutations, biases, dense rest."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint.int4 import pack_int4
from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import canonical
from permllm_vllm.checkpoint.schema import QuantizationConfig, computed_dtype
from permllm_vllm.checkpoint.writer import write_checkpoint

UP, DOWN, OUT = "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj"
SHAPES = {UP: (128, 64), DOWN: (64, 128), OUT: (64, 40)}


@dataclass
class TinyModel:
    """What was pruned (`dense`: served weights, pruned ones zero) and what is to be stored."""

    quantization: QuantizationConfig
    source: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.quantization.pattern)

    def write(self, output: Path, **options: Any) -> Path:
        write_checkpoint(output, self.tensors.items(), self.quantization, self.source, **options)
        return output


def random_permutation(channels: int, block: int, shuffle: random.Random) -> Tensor:
    entries = [e for _ in range(channels // block) for e in shuffle.sample(range(block), block)]
    return torch.tensor(entries, dtype=torch.uint8)


def random_mask(shape: tuple[int, int], pattern: Pattern, generator: torch.Generator) -> Tensor:
    groups = torch.rand(shape[0], shape[1] // pattern.group, pattern.group, generator=generator)
    kept = groups.topk(pattern.kept, dim=2).indices
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True).flatten(1)


def add_sparse_layer(
    model: TinyModel, name: str, kind: str, generator: torch.Generator, shuffle: random.Random
) -> None:
    shape, value_dtype = SHAPES[kind], model.quantization.value_dtype
    dtype = computed_dtype(value_dtype)
    weight = torch.randint(-99, 100, shape, generator=generator).to(dtype)
    mask = random_mask(shape, model.pattern, generator)
    if value_dtype == "int4":
        groups = (shape[0], -(-shape[1] // 64))
        multipliers = torch.randint(1, 17, groups, generator=generator).to(torch.uint8)
        weight = weight % 16 - 8
        weight *= multipliers.to(torch.int8).repeat_interleave(64, dim=1)[:, : shape[1]]
        values = pack_int4(pack_values(weight, mask, model.pattern), multipliers)
        model.tensors[f"{name}.weight_multiplier"] = multipliers
    else:
        values = pack_values(weight, mask, model.pattern)
    model.tensors[f"{name}.weight_packed"] = values
    model.tensors[f"{name}.weight_mask"] = pack_mask(mask)
    served = weight * mask
    if dtype == torch.int8:
        scale = torch.rand(shape[0], generator=generator) + 0.1
        model.tensors[f"{name}.weight_scale"] = scale
        served = served.float() * scale[:, None]
    if kind != OUT:
        permutation = random_permutation(shape[1], 32, shuffle)
        permutation = canonical(permutation, 32, model.pattern)
        which = "input_permutation" if kind == UP else "folded_permutation"
        model.tensors[f"{name}.{which}"] = permutation
    if kind == UP:
        bias = torch.randn(shape[0], generator=generator)
        model.tensors[f"{name}.bias"] = model.dense[f"{name}.bias"] = bias
        permuted, served = served, torch.empty_like(served)
        for j, entry in enumerate(permutation.tolist()):
            served[:, j // 32 * 32 + entry] = permuted[:, j]
    model.dense[f"{name}.weight"] = served


def build_tiny_model(source: Path, pattern: str, value_dtype: str, seed: int = 0) -> TinyModel:
    generator, shuffle = torch.Generator().manual_seed(seed), random.Random(seed)
    layers = [f"model.layers.{i}" for i in range(2)]
    quantization = QuantizationConfig(
        pattern=pattern,
        block_size=32,
        value_dtype=value_dtype,
        ignore=["lm_head"],
        runtime_permuted=[f"{layer}.{UP}" for layer in layers],
        folded=[f"{layer}.{DOWN}" for layer in layers],
    )
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))
    (source / "tokenizer.json").write_text("{}")
    model = TinyModel(quantization, source)
    plain = {"model.embed_tokens.weight": (50, 64), "model.norm.weight": (64,)}
    for name, shape in {**plain, "lm_head.weight": (50, 64)}.items():
        model.tensors[name] = model.dense[name] = torch.randn(shape, generator=generator)
    for layer in layers:
        for kind in SHAPES:
            add_sparse_layer(model, f"{layer}.{kind}", kind, generator, shuffle)
    save_file({"old.weight": torch.zeros(4)}, source / "model.safetensors")
    return model


@pytest.fixture
def tiny_model(tmp_path: Path) -> TinyModel:
    return build_tiny_model(tmp_path / "source", "2:4", "bfloat16")


@pytest.fixture
def make_tiny_model(tmp_path: Path) -> Callable[[str, str], TinyModel]:
    return lambda pattern, dtype: build_tiny_model(
        tmp_path / f"source-{pattern}-{dtype}", pattern, dtype
    )
