"""Sparse modules in the checkpoint format, made with plain loops, and their dense weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from permllm_vllm.checkpoint.schema import QuantizationConfig
from permllm_vllm.quantization.config import PermLLMConfig

BLOCK = 64
PACKED_MODULES = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate", "up"]}


@dataclass(frozen=True)
class SparseModule:
    """One module: its tensors by kind, and the dense weight `[out, in]` in input order."""

    tensors: dict[str, Tensor]
    dense: Tensor


def permutation(channels: int, seed: int = 0) -> Tensor:
    """Random block-local permutation `[channels]`."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [torch.randperm(BLOCK, generator=generator) for _ in range(channels // BLOCK)]
    return torch.cat(blocks).to(torch.uint8)


def sparse_module(
    rows: int,
    channels: int,
    *,
    kept: int = 2,
    group: int = 4,
    local: Tensor | None = None,
    kind: str = "input_permutation",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> SparseModule:
    """A random module; `local` permutes its input at run time, or was folded, as `kind` says."""
    generator = torch.Generator().manual_seed(seed)
    permuted = torch.zeros(rows, channels, dtype=dtype)
    values = torch.empty(rows, channels * kept // group, dtype=dtype)
    mask = torch.zeros(rows, channels // 8, dtype=torch.uint8)
    for row in range(rows):
        filled = 0
        for start in range(0, channels, group):
            chosen = torch.randperm(group, generator=generator)[:kept].sort().values
            for channel in (start + chosen).tolist():
                value = float(torch.randn((), generator=generator))
                permuted[row, channel] = value
                values[row, filled] = value
                mask[row, channel // 8] |= 1 << (channel % 8)
                filled += 1
    tensors = {"weight_packed": values, "weight_mask": mask}
    dense = permuted
    if local is not None:
        tensors[kind] = local
        if kind == "input_permutation":
            dense = torch.zeros_like(permuted)
            for channel in range(channels):
                dense[:, channel // BLOCK * BLOCK + int(local[channel])] = permuted[:, channel]
    return SparseModule(tensors, dense)


def int4_module(
    rows: int, channels: int, *, local: Tensor, kind: str = "input_permutation", seed: int = 0
) -> SparseModule:
    """The same of int4 values, with other multipliers for every group."""
    tensors = dict(sparse_module(rows, channels, local=local, kind=kind, seed=seed).tensors)
    permuted = kind == "input_permutation"
    masks, places = tensors["weight_mask"].tolist(), local.tolist()
    packed = [[0] * (channels // 4) for _ in range(rows)]
    multipliers = [[1 + (3 * row + g) % 16 for g in range(channels // 64)] for row in range(rows)]
    values = [[0] * channels for _ in range(rows)]
    for row in range(rows):
        filled = 0
        for channel in range(channels):
            if not masks[row][channel // 8] >> (channel % 8) & 1:
                continue
            quotient = (7 * filled + 5 * row + seed) % 16 - 8
            packed[row][filled // 2] += (quotient + 8) << (4 * (filled % 2))
            place = channel // BLOCK * BLOCK + places[channel] if permuted else channel
            values[row][place] = quotient * multipliers[row][channel // 64]
            filled += 1
    scale = torch.linspace(0.5, 2.0, rows)
    tensors |= {
        "weight_packed": torch.tensor(packed, dtype=torch.uint8),
        "weight_multiplier": torch.tensor(multipliers, dtype=torch.uint8),
        "weight_scale": scale,
    }
    return SparseModule(tensors, torch.tensor(values, dtype=torch.float32) * scale[:, None])


def config(
    runtime_permuted: Sequence[str] = (),
    folded: Sequence[str] = (),
    ignore: Sequence[str] = (),
    *,
    pattern: str = "2:4",
    value_dtype: str = "float32",
    smoothed: bool = False,
) -> PermLLMConfig:
    """The configuration that vLLM would hand to the layers of such a checkpoint."""
    quantization = QuantizationConfig(
        pattern=pattern,
        block_size=BLOCK,
        value_dtype=value_dtype,
        ignore=list(ignore),
        runtime_permuted=list(runtime_permuted),
        smoothed=smoothed,
        folded=list(folded),
    )
    made = PermLLMConfig.from_config(quantization.to_dict())
    made.packed_modules_mapping = PACKED_MODULES
    return made


def load(layer: torch.nn.Module, module: SparseModule, shard_id: str | int | None = None) -> None:
    """Hand over a module's tensors as vLLM's model loader does."""
    for kind, tensor in module.tensors.items():
        parameter = getattr(layer, kind)
        arguments = () if shard_id is None else (shard_id,)
        parameter.weight_loader(parameter, tensor, *arguments)


def packed_dense(layer: torch.nn.Module) -> Tensor:
    """Finish loading a layer, and read its dense weight by unit inputs."""
    layer.quant_method.process_weights_after_loading(layer)
    inputs = getattr(layer, "input_size_per_partition", layer.input_size)
    unit = torch.eye(inputs, dtype=layer.params_dtype)
    output: Tensor = layer.quant_method.apply(layer, unit)
    return output.t()
