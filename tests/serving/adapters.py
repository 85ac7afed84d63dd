"""A LoRA adapter in PEFT's files, with random weights for every linear of a Llama."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK = 4


def random_adapter(model: Path, directory: Path) -> Path:
    """Write an adapter that changes every linear of the decoder layers of a dense model."""
    generator = torch.Generator().manual_seed(2)
    tensors, modules = {}, set()
    for name, weight in load_file(model / "model.safetensors").items():
        module = name.removesuffix(".weight")
        if not module.endswith("_proj"):
            continue
        modules.add(module.rpartition(".")[2])
        for part, shape in (("A", (RANK, weight.shape[1])), ("B", (weight.shape[0], RANK))):
            matrix = 0.05 * torch.randn(shape, generator=generator)
            tensors[f"base_model.model.{module}.lora_{part}.weight"] = matrix
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors")
    description = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "bias": "none",
        "target_modules": sorted(modules),
    }
    (directory / "adapter_config.json").write_text(json.dumps(description))
    return directory
