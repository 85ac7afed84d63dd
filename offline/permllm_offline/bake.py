"""Bake decisions into the tensors of a checkpoint: fold, permute, mask, pack."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from permllm_offline.decisions import GroupDecision, LayerDecision
from permllm_offline.int8_values import round_to_int8
from permllm_offline.model.modules import linear_of
from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.folding import fold_rows
from permllm_vllm.checkpoint.packing import pack_mask, pack_values
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute, permute_columns


def bake_layer(
    name: str,
    layer: nn.Module,
    decision: LayerDecision,
    pattern: Pattern,
    scales: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint tensors of every pruned linear of one decoder layer.

    Args:
        name: module name of the decoder layer.
        layer: the decoder layer, weights in original order.
        decision: of each of its shared-input groups.
        pattern: N and M.
        scales: linear -> float32 [out_features] in original row order: write int8 values.

    Yields:
        Tensor names and tensors of format version 1, in forward order.
    """
    sizes = {linear: len(mask) for group in decision for linear, mask in group.masks.items()}
    folds = row_permutations(decision, sizes)
    for group in decision:
        for linear in group.masks:
            module = linear_of(layer, linear)
            scale = None if scales is None else scales[linear]
            tensors = _bake_linear(module, group, linear, folds.get(linear), pattern, scale)
            for kind, tensor in tensors:
                yield f"{name}.{linear}.{kind}", tensor


def row_permutations(
    decision: LayerDecision, sizes: Mapping[str, int]
) -> Mapping[str, tuple[Tensor, int]]:
    """Linears whose rows a fold moves: int64 [out_features], one block of out_features rows.

    ``sizes`` gives the out_features of every linear that a fold may move into.
    """
    orders = {linear: torch.arange(size) for linear, size in sizes.items()}
    moved = set()
    for group in decision:
        layout, permutation = group.layout, group.permutation
        if not layout.folded or permutation is None:
            continue
        channels = absolute(layout.rows(permutation), layout.block_size)
        for part in layout.group.fold_into:
            rows = part.rows(sizes[part.linear], layout.heads)
            orders[part.linear][rows] = rows[channels]
            moved.add(part.linear)
    return {linear: (orders[linear], sizes[linear]) for linear in moved}


def _bake_linear(
    module: nn.Linear,
    group: GroupDecision,
    linear: str,
    rows: tuple[Tensor, int] | None,
    pattern: Pattern,
    scale: Tensor | None,
) -> Iterator[tuple[str, Tensor]]:
    weight: Tensor = module.weight.detach().cpu()
    if scale is not None:
        weight = round_to_int8(weight, scale)
    bias: Tensor | None = module.bias
    mask = group.mask(linear)
    if rows is not None:
        weight, mask = fold_rows(weight, *rows), fold_rows(mask, *rows)
    permutation, block_size = group.permutation, group.layout.block_size
    if permutation is not None:
        weight = permute_columns(weight, permutation, block_size)
        mask = permute_columns(mask, permutation, block_size)
    yield schema.WEIGHT_PACKED, pack_values(weight.contiguous(), mask, pattern)
    yield schema.WEIGHT_MASK, pack_mask(mask)
    if scale is not None:
        yield schema.WEIGHT_SCALE, scale if rows is None else fold_rows(scale, *rows)
    if permutation is not None:
        folded = group.layout.folded
        yield (schema.FOLDED_PERMUTATION if folded else schema.INPUT_PERMUTATION), permutation
    if bias is not None:
        bias = bias.detach().cpu()
        yield schema.BIAS, bias if rows is None else fold_rows(bias, *rows)


def apply_masks(layer: nn.Module, decision: LayerDecision) -> None:
    """Zero the pruned weights of a decoder layer in place: the dense twin of what is baked."""
    for group in decision:
        for linear in group.masks:
            weight = linear_of(layer, linear).weight
            weight.data.masked_fill_(~group.mask(linear).to(weight.device), 0)
