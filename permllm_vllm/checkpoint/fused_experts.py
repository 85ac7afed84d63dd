"""Experts of a layer that a dense checkpoint has in two tensors, seen as a matrix for each linear.

``experts.gate_up_proj`` [experts, 2 x inner, hidden] holds the rows of gate and then those of up of
one expert after the other, ``experts.down_proj`` [experts, hidden, inner] those of down, as
published Qwen3.5 mixtures do; those of Granite call them ``input_linear.weight`` and
``output_linear.weight``. Here they are ``experts.3.gate_proj.weight`` and so on, the names that
mixtures of separate experts have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from permllm_vllm.checkpoint.headers import TensorHeader

_GATE_UP, _DOWN = ("gate_proj", "up_proj"), ("down_proj",)


class _Form(NamedTuple):
    """The module of the experts that a tensor joins, and the linears of one, in order."""

    experts: str
    linears: tuple[str, ...]


_FORMS = {
    "experts.gate_up_proj": _Form("experts", _GATE_UP),
    "experts.down_proj": _Form("experts", _DOWN),
    "block_sparse_moe.input_linear.weight": _Form("block_sparse_moe.experts", _GATE_UP),
    "block_sparse_moe.output_linear.weight": _Form("block_sparse_moe.experts", _DOWN),
}
"""By the end of the tensor's name."""


class Part(NamedTuple):
    """A matrix inside a stored tensor: its first element there, counted in elements, its shape."""

    tensor: str
    start: int
    shape: tuple[int, int]


def is_fused(name: str) -> bool:
    """Whether a tensor of this name may hold a linear of all experts of a layer."""
    return _ending(name) is not None


def parts_of(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, Part]]:
    """Yield the matrices of a tensor that ``is_fused`` by their names, none if it has no experts.

    Args:
        name: of the tensor.
        shape: [experts, rows of all parts, columns].
    """
    ending = _ending(name)
    assert ending is not None
    form = _FORMS[ending]
    count = len(form.linears)
    if len(shape) != 3 or shape[1] % count:
        return
    module, matrix = name.removesuffix(ending) + form.experts, (shape[1] // count, shape[2])
    for expert in range(shape[0]):
        for at, linear in enumerate(form.linears):
            start = (expert * count + at) * math.prod(matrix)
            yield f"{module}.{expert}.{linear}.weight", Part(name, start, matrix)


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


def _ending(name: str) -> str | None:
    """What of a name says its form."""
    return next((one for one in _FORMS if f".{name}".endswith(f".{one}")), None)
