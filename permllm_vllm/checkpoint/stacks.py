"""Stacks of like modules in the names of tensors: decoder layers, and the experts of a layer."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple


class Place(NamedTuple):
    """A name split at one of its numbers: stack, number, and what follows it."""

    stack: str
    number: str
    inside: str


def places_in_stacks(name: str) -> Iterator[Place]:
    """Split "model.layers.3.mlp.experts.0.up_proj" at its layer, and at its expert."""
    parts = name.split(".")
    for at, part in enumerate(parts):
        if part.isascii() and part.isdecimal():
            yield Place(".".join(parts[:at]), part, ".".join(parts[at + 1 :]))


class Stack:
    """What is inside the modules of one stack: by number and path, the names of its children."""

    def __init__(self) -> None:
        self._inside: dict[str, dict[str, set[str]]] = {}
        self._matrices: dict[str, dict[str, set[str]]] = {}
        self._beside: dict[tuple[str, str], set[str]] = {}

    @property
    def numbers(self) -> Collection[str]:
        """The numbers of its modules."""
        return self._inside.keys()

    def add(self, place: Place, dimensions: int) -> None:
        """Count a tensor in; all are added before any is asked for."""
        held = [self._inside.setdefault(place.number, {})]
        if dimensions > 1:
            held.append(self._matrices.setdefault(place.number, {}))
        for path, child in _steps(place.inside):
            for children in held:
                children.setdefault(path, set()).add(child)

    def is_of_another_kind(self, number: str, wanted: str) -> bool:
        """Whether a module lacks one that others have, and has matrices that these lack there.

        A layer without `self_attn` is of another kind where it has a `linear_attn`, one whose `mlp`
        has no `experts` where that has a `gate_proj`. Of a module without any matrix, whatever it
        has counts.
        """
        held = self._matrices.get(number, self._inside[number])
        for path, child in _steps(wanted):
            if child not in self._inside[number].get(path, ()):
                return not held.get(path, set()) <= self._held_beside(path, child)
        return False

    def _held_beside(self, path: str, child: str) -> set[str]:
        """What lies in a path of the modules that have some child there."""
        key = path, child
        if key not in self._beside:
            having = (inside.get(path, set()) for inside in self._inside.values())
            self._beside[key] = set().union(*(held for held in having if child in held))
        return self._beside[key]


def holds_experts(stack: str) -> bool:
    """Whether a stack is of the experts of a layer, by its name: "model.layers.3.mlp.experts"."""
    return stack.rpartition(".")[2] == "experts"


def _steps(name: str) -> Iterator[tuple[str, str]]:
    """Go down a name: ("", "mlp"), ("mlp", "up_proj"), ("mlp.up_proj", "weight")."""
    path = ""
    for child in name.split("."):
        yield path, child
        path = f"{path}.{child}" if path else child
