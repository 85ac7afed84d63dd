"""What a backend takes and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from permllm_vllm.checkpoint.pattern import Pattern


@dataclass(frozen=True)
class CheckpointWeights:
    """One sparse linear layer as the checkpoint holds it, in permuted input order.

    Attributes:
        values: `[out, in * kept / group]`, the kept values, group by group.
        mask: uint8 `[out, in / 8]`, bit `j % 8` of byte `j / 8` set where channel `j` is kept.
        permutation: uint8 `[in]`, local to its block, where it is applied at run time, else None.
        scale: float32 `[out]` for int8 values, else None.
        pattern: the N:M pattern.
        block_size: channels per permutation block: 32, 64 or 128.
    """

    values: Tensor
    mask: Tensor
    permutation: Tensor | None
    scale: Tensor | None
    pattern: Pattern
    block_size: int


@dataclass(frozen=True)
class PackedWeights:
    """The same layer as one backend lays it out: the tensor arguments of `sparse_linear`.

    `four_bits` tells whether its int8 values are in 4 bits each.
    """

    packed: Tensor
    metadata: Tensor | None = None
    permutation: Tensor | None = None
    scale: Tensor | None = None
    four_bits: bool = False


@dataclass(frozen=True)
class StackedWeights:
    """One linear layer of all experts, packed: tensor arguments of `sparse_experts`.

    Attributes:
        packed: uint8, the packed weights one after the other.
        metadata: int64 `[experts, fields]`, of each what was its metadata, and its place.
        permutation: int32 `[experts, in]`, or None.
        scale: float32 `[experts, out]`, or None.
    """

    packed: Tensor
    metadata: Tensor
    permutation: Tensor | None
    scale: Tensor | None


class Backend(Protocol):
    """One way to lay out and multiply."""

    name: str
    instruction_set: str

    def pack(self, weights: CheckpointWeights) -> PackedWeights:
        """Lays out one layer, once, after loading.

        Raises:
            RuntimeError: tensors that do not fit each other, or masks that keep a wrong number.
        """
        ...


def stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    """One tensor of tensors alike; None where there are none."""
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None
