"""Dense experts as checkpoints of their family have them: those of a layer in two tensors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor

from permllm_offline.model.family import Family
from permllm_vllm.checkpoint.errors import FETCH_AGAIN, Problem

_GATE_UP, _DOWN = "gate_up_proj", "down_proj"
"""What Transformers calls the two, inside the module of the experts."""


def joined_experts(
    tensors: Iterable[tuple[str, Tensor]], family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Put the two tensors of a layer in place of the weights of its separate dense experts.

    Transformers finds only those where a family is ``joined``; tensors of another pass as they are.
    One comes when its last part has, and is in memory from the first on.

    Args:
        tensors: of a checkpoint, by name.
        family: of the model, its groups with those of all experts.

    Yields:
        Names and tensors; joined are ``gate_up_proj`` [experts, 2 x inner, hidden] and
        ``down_proj`` [experts, hidden, inner], by the names that the checkpoint has for them.

    Raises:
        CheckpointError: a layer has some of the parts of a tensor alone.
    """
    if not (family.joined and family.experts):
        yield from tensors
        return
    experts = sum(group.reads_whole for group in family.groups)
    begun: dict[str, _Joined] = {}
    for name, tensor in tensors:
        place = _place(name, family)
        if place is None:
            yield name, tensor
            del tensor  # not held while the next is read
            continue
        whole = family.stored_name(place.layer, f"{family.experts}.{place.kind}")
        if whole not in begun:
            begun[whole] = _Joined.empty(experts, place.linears, tensor)
        begun[whole].add(place, tensor)
        del tensor
        if not begun[whole].missing:
            yield whole, begun.pop(whole).tensor
    for whole, joined in begun.items():
        rule = f"with some experts of a layer, all {experts} are there"
        raise Problem(whole, f"{joined.missing} parts are missing", rule, FETCH_AGAIN).as_error()


class _Place(NamedTuple):
    """Of a part: its layer, the tensor that it belongs to, and what lies in that of one expert."""

    layer: int
    kind: str
    expert: int
    linear: str
    linears: tuple[str, ...]


class _Joined:
    """A tensor of all experts, and how many of its parts have not come."""

    def __init__(self, tensor: Tensor, missing: int) -> None:
        self.tensor, self.missing = tensor, missing

    @classmethod
    def empty(cls, experts: int, linears: Sequence[str], part: Tensor) -> _Joined:
        rows, columns = part.shape
        return cls(part.new_empty(experts, len(linears) * rows, columns), experts * len(linears))

    def add(self, place: _Place, part: Tensor) -> None:
        first = place.linears.index(place.linear) * len(part)
        self.tensor[place.expert, first : first + len(part)] = part
        self.missing -= 1


def _place(name: str, family: Family) -> _Place | None:
    """Where the dense weight of an expert's linear belongs; None for all other tensors."""
    layer, _, part = name.removeprefix(family.stack).partition(".")
    expert, _, inside = part.removeprefix(f"{family.experts}.").partition(".")
    linear, _, kind = inside.partition(".")
    if not (layer.isdecimal() and expert.isdecimal()) or kind != "weight":
        return None
    separate = f"{family.experts}.{expert}.{linear}.weight"
    if linear not in family.expert_linears or name != family.stored_name(int(layer), separate):
        return None
    *gate_up, down = family.expert_linears
    of_down = linear == down
    linears = (down,) if of_down else tuple(gate_up)
    return _Place(int(layer), _DOWN if of_down else _GATE_UP, int(expert), linear, linears)
