"""Files of weights of 8 bits and their scales, and what they stand for."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from permllm_vllm.checkpoint.headers import TensorHeader
from permllm_vllm.checkpoint.scaled import Block
from permllm_vllm.checkpoint.scaled_form import ScaledForm
from permllm_vllm.checkpoint.scaled_tensors import open_parts
from permllm_vllm.checkpoint.tensors import StoredTensors
from tests.checkpoint.plain_scaled import quantized, restored

FORM = ScaledForm("float8_e4m3fn", Block(4, 3))
LAYER = "model.layers.0"
UP, DOWN = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"
EXPERTS = "model.layers.0.mlp.experts"


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + sum(shape)))


def pair(*shape: int, form: ScaledForm = FORM) -> tuple[Tensor, Tensor, Tensor]:
    """A random matrix as it is stored, its scales, and what both stand for."""
    rows, columns = form.block.rows or shape[0], form.block.columns or shape[1]
    stored, scale = quantized(random(*shape), rows, columns, getattr(torch, form.stored))
    scales = torch.tensor(scale)
    return stored, scales, restored(stored, scales.tolist(), rows, columns)


def open_with(
    tensors: Mapping[str, Tensor],
    directory: Path,
    form: ScaledForm | None = FORM,
    dtype: torch.dtype = torch.bfloat16,
    experts_under: str | None = None,
) -> StoredTensors:
    owned = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(owned, directory / "model.safetensors", metadata={"format": "pt"})
    return StoredTensors(open_parts(directory, form, dtype), experts_under=experts_under)


def headers_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorHeader]:
    return {n: TensorHeader(tuple(t.shape), str(t.dtype)[6:]) for n, t in tensors.items()}
