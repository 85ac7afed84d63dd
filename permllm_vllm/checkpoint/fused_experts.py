"""Experts of a layer that a dense checkpoint has in two tensors, seen as a matrix for each linear.

``experts.gate_up_proj`` [experts, 2 x inner, hidden] holds the rows of gate and then those of up of
one expert after the other, ``experts.down_proj`` [experts, hidden, inner] those of down, as
published Qwen3.5 mixtures do. Here they are ``experts.3.gate_proj.weight`` and so on, the names
that mixtures of separate experts have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from permllm_vllm.checkpoint.headers import TensorHeader

_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Part(NamedTuple):
    """A matrix inside a stored tensor: its first element there, counted in elements, its shape."""

    tensor: str
    start: int
    shape: tuple[int, int]


def is_fused(name: str) -> bool:
    """Whether a tensor of this name may hold a linear of all experts of a layer."""
    parent, _, kind = name.rpartition(".")
    return kind in _PARTS and parent.rpartition(".")[2] == "experts"


def linears_in(name: str) -> int:
    """How many linears of an expert a tensor of this name joins, one after the other."""
    return len(_PARTS[name.rpartition(".")[2]]) if is_fused(name) else 1


def parts_of(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Part]]:
    """Yield the matrices of a tensor that ``is_fused`` by their names, none if it has no experts.

    Args:
        name: of the tensor.
        shape: [experts, rows of all parts, columns].
    """
    module, _, kind = name.rpartition(".")
    parts = _PARTS[kind]
    if len(shape) != 3 or shape[1] % len(parts):
        return
    matrix = shape[1] // len(parts), shape[2]
    for expert in range(shape[0]):
        for at, part in enumerate(parts):
            start = (expert * len(parts) + at) * math.prod(matrix)
            yield f"{module}.{expert}.{part}.weight", Part(name, start, matrix)


def separate(headers: Mapping[str, TensorHeader], under: str) -> dict[str, TensorHeader]:
    """Put the headers of separate matrices in place of those of fused experts.

    Args:
        headers: of a checkpoint, by name.
        under: what the names of tensors begin with that are looked at.
    """
    found: dict[str, TensorHeader] = {}
    for name, header in headers.items():
        parts = (
            dict(parts_of(name, header.shape)) if name.startswith(under) and is_fused(name) else {}
        )
        if parts:
            found |= {one: TensorHeader(part.shape, header.dtype) for one, part in parts.items()}
        else:
            found[name] = header
    return found
