"""Dense experts as checkpoints of their family have them: those of a layer in two tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from permllm_offline.model.family import Family

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
"""What Transformers calls the two, inside the module of the experts."""


def joined_experts(
    tensors: Iterable[tuple[str, Tensor]], family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Put the two tensors of a layer in place of the weights of its separate dense experts.

    Transformers finds only those where a family is ``joined``; tensors of another pass as they are.
    Parts are held until the last one has come.

    Args:
        tensors: of a checkpoint, by name.
        family: of the model, its groups with those of all experts.

    Yields:
        Names and tensors; joined are ``gate_up_proj`` [experts, 2 x inner, hidden] and
        ``down_proj`` [experts, hidden, inner], by the names that the checkpoint has for them.
    """
    if not (family.joined and family.experts):
        yield from tensors
        return
    experts = sum(group.reads_whole for group in family.groups)
    held: dict[tuple[int, str], dict[tuple[int, str], Tensor]] = {}
    for name, tensor in tensors:
        place = _place(name, family)
        if place is None:
            yield name, tensor
            del tensor  # not held while the next is read
            continue
        layer, expert, linear = place
        kind = _DOWN if linear == family.gated[-1] else _GATE_UP
        linears = family.gated[-1:] if kind == _DOWN else family.gated[:-1]
        parts = held.setdefault((layer, kind), {})
        parts[expert, linear] = tensor
        if len(parts) == experts * len(linears):
            del held[layer, kind]
            stack = [torch.cat([parts.pop((n, one)) for one in linears]) for n in range(experts)]
            yield family.stored_name(layer, f"{family.experts}.{kind}"), torch.stack(stack)


def _place(name: str, family: Family) -> tuple[int, int, str] | None:
    """Layer, expert and linear whose dense weight has a name; None for all other tensors."""
    layer, _, part = name.removeprefix(family.stack).partition(".")
    expert, _, inside = part.removeprefix(f"{family.experts}.").partition(".")
    linear, _, kind = inside.partition(".")
    if not (layer.isdecimal() and expert.isdecimal()) or kind != "weight":
        return None
    found = int(layer), int(expert), linear
    separate = family.stored_name(int(layer), f"{family.experts}.{expert}.{linear}.weight")
    return found if name == separate and linear in family.gated else None
