"""Bake decisions into the tensors of a checkpoint: fold, smooth, permute, mask, pack."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from permllm_offline.model.modules import linear_of
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision
from permllm_offline.sparsity.grid import Grid
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.rounded_layer import RoundedLayer
from permllm_offline.sparsity.smoothing import divided_by
from permllm_vllm.checkpoint import schema
from permllm_vllm.checkpoint.packing import pack_mask, pack_values, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute, permute_columns


def bake_layer(
    name: Callable[[str], str],
    weights: Mapping[str, Tensor],
    decision: LayerDecision,
    pattern: Pattern,
    rounded: RoundedLayer | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint tensors of every pruned linear of one decoder layer.

    Args:
        name: gives what the checkpoint calls a part of the decoder layer.
        weights: ``<linear>.weight`` and ``.bias`` of the layer in original order, each asked for
            when its linear is baked.
        decision: of each of its shared-input groups.
        pattern: N and M.
        rounded: the grids of its linears, in original row order: write integers.

    Yields:
        Tensor names and tensors of the format, in forward order.
    """
    sizes = {linear: len(mask) for group in decision for linear, mask in group.masks.items()}
    folds = row_permutations(decision, sizes)
    divided = {} if rounded is None else row_exponents(decision, sizes, rounded)
    for group in decision:
        for linear in group.masks:
            grid = None if rounded is None else rounded.grid(group.layout.group.name, linear)
            rows = _Rows(folds.get(linear), divided.get(linear))
            tensors = _bake_linear(weights, group, linear, rows, pattern, grid)
            for kind, tensor in tensors:
                yield f"{name(linear)}.{kind}", tensor


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


def row_exponents(
    decision: LayerDecision, sizes: Mapping[str, int], rounded: RoundedLayer
) -> Mapping[str, Tensor]:
    """Linears whose rows are divided so that others meet smoothed inputs: int8 [out_features].

    ``sizes`` gives the out_features of every linear that may be one.
    """
    found: dict[str, Tensor] = {}
    for group in decision:
        layout = group.layout
        exponents = rounded.exponents.get(layout.group.name)
        if exponents is None:
            continue
        for part in layout.group.fold_into:
            if part.proportional:
                size = sizes[part.linear]
                own = found.setdefault(part.linear, torch.zeros(size, dtype=torch.int8))
                own[part.rows(size, layout.heads)] = layout.rows(exponents)
    return found


def divided_norms(decision: LayerDecision, rounded: RoundedLayer) -> Mapping[str, Tensor]:
    """Norms of a decoder layer that are divided so that linears meet smoothed inputs: int8 [in]."""
    groups = (one.layout.group for one in decision)
    return {
        group.norm: rounded.exponents[group.name]
        for group in groups
        if group.norm and group.name in rounded.exponents
    }


@dataclass(frozen=True)
class _Rows:
    """What happens to the rows of a linear: their order by a fold, and what divides them."""

    moved: tuple[Tensor, int] | None
    exponents: Tensor | None

    def order(self, count: int) -> Tensor:
        """New row -> old one."""
        return torch.arange(count) if self.moved is None else self.moved[0]

    def divided(self, numbers: Tensor) -> Tensor:
        """Numbers of each row, in the old order."""
        return divided_by(numbers, self.exponents)


def _bake_linear(
    weights: Mapping[str, Tensor],
    group: GroupDecision,
    linear: str,
    own: _Rows,
    pattern: Pattern,
    grid: Grid | None,
) -> Iterator[tuple[str, Tensor]]:
    weight = weights[f"{linear}.weight"].detach().cpu()
    order = own.order(len(weight))
    permutation, block_size = group.permutation, group.layout.block_size
    values: list[dict[str, Tensor]] = []
    masks = []
    for part in row_chunks(weight.shape):
        rows = order[part]
        some, mask = weight[rows], unpack_mask(group.masks[linear][rows])
        if grid is not None:
            some = grid.integers(some, rows=rows)
        if permutation is not None:
            some = permute_columns(some, permutation, block_size)
            mask = permute_columns(mask, permutation, block_size)
        kept = pack_values(some, mask, pattern)
        values.append(
            {schema.WEIGHT_PACKED: kept} if grid is None else grid.stored(kept, rows=rows)
        )
        masks.append(pack_mask(mask))
    del weight  # what is yielded is written, or copied, while this waits
    for kind in tuple(values[0]):
        yield kind, torch.cat([part.pop(kind) for part in values])
    yield schema.WEIGHT_MASK, torch.cat(masks)
    if grid is not None:
        yield schema.WEIGHT_SCALE, own.divided(grid.scale)[order]
    if permutation is not None:
        folded = group.layout.folded
        yield (schema.FOLDED_PERMUTATION if folded else schema.INPUT_PERMUTATION), permutation
    bias = weights.get(f"{linear}.bias")
    if bias is not None:
        yield schema.BIAS, own.divided(bias.detach().cpu())[order]


def apply_masks(layer: nn.Module, decision: LayerDecision) -> None:
    """Zero the pruned weights of a decoder layer in place: the dense twin of what is baked."""
    for group in decision:
        for linear in group.masks:
            weight = linear_of(layer, linear).weight.data
            for rows in row_chunks(weight.shape):
                mask = unpack_mask(group.masks[linear][rows]).to(weight.device)
                weight[rows].masked_fill_(~mask, 0)
