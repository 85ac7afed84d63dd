"""Shared-input groups that many families have, from the names of their linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from permllm_offline.model.family import Family, Fold, SharedInputGroup
from permllm_offline.model.row_parts import RowPart, every_row, first_half, second_half

Groups = tuple[SharedInputGroup, ...]


def attention(
    queries: str, keys: str, values: str, output: str, *, proportional: bool = True
) -> Groups:
    """Queries, keys and values, and what reads the attention over them.

    That is ``proportional`` to the values where these have no norm.
    """
    rows = (RowPart(values, every_row, proportional),)
    return (
        SharedInputGroup("qkv", (queries, keys, values)),
        SharedInputGroup("o", (output,), Fold.VALUE_HEADS, rows),
    )


def mlp(module: str, label: str = "", linears: Sequence[str] = Family.expert_linears) -> Groups:
    """The linears of an MLP, gated where there are three."""
    names = [f"{module}.{one}" for one in linears]
    return plain_mlp(*names, label=label) if len(names) == 2 else _gated_mlp(*names, label=label)


def plain_mlp(first: str, second: str, *, label: str = "") -> Groups:
    """Two linears with an activation between them."""
    rows = (RowPart(first, every_row),)
    return (
        SharedInputGroup(f"{label}fc1", (first,)),
        SharedInputGroup(f"{label}fc2", (second,), Fold.ELEMENTWISE, rows),
    )


def _gated_mlp(gate: str, up: str, down: str, *, label: str) -> Groups:
    """Gate and up, and one that reads their products."""
    rows = (RowPart(gate, every_row), RowPart(up, every_row, proportional=True))
    return (
        SharedInputGroup(f"{label}gate_up", (gate, up)),
        SharedInputGroup(f"{label}down", (down,), Fold.ELEMENTWISE, rows),
    )


def fused_gated_mlp(gate_up: str, down: str) -> Groups:
    """Gate and up in one linear, one after the other, and one that reads their products."""
    rows = (RowPart(gate_up, first_half), RowPart(gate_up, second_half, proportional=True))
    return (
        SharedInputGroup("gate_up", (gate_up,)),
        SharedInputGroup("down", (down,), Fold.ELEMENTWISE, rows),
    )


def after(norms: Mapping[str, str], groups: Groups) -> Groups:
    """Groups with the norms that they alone read, by the name of the group."""
    return tuple(replace(group, norm=norms.get(group.name, "")) for group in groups)


def in_some_layers(*groups: SharedInputGroup) -> Groups:
    """Groups that only some decoder layers have, as in hybrid models."""
    return tuple(replace(group, in_every_layer=False) for group in groups)
