"""Optimal Brain Surgeon, column by column: the update of SparseGPT (arXiv 2301.00774).

Whatever a pruned weight contributed is put on the columns after it, in the way that the second
moment of the inputs says is best. The columns are visited in the permuted order, so that a group of
M consecutive ones can choose its own mask from weights that are already updated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from permllm_offline.errors import OfflineError
from permllm_offline.model.modules import linear_of
from permllm_offline.reconstruction.group_inputs import LayerInputs, add_second_moment
from permllm_offline.reconstruction.layer_work import LayerWork
from permllm_offline.sparsity.decisions import GroupDecision, LayerDecision, RetainedSums
from permllm_offline.sparsity.importance import row_chunks
from permllm_offline.sparsity.mask import keep_channels
from permllm_vllm.checkpoint.packing import pack_mask, unpack_mask
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.permutation import absolute

logger = logging.getLogger(__name__)

DAMPING = 0.01
"""Added to the diagonal of the second moment, relative to its mean."""

DAMPING_LIMIT = 10.0
"""Relative damping that no real second moment needs."""

FACTOR_BYTES = 4 + 8
"""For each element of a second moment while it is factored: itself, and float64."""

USED_FACTOR_BYTES = 4
"""The same while columns are updated: the factor, in the place of the moment."""

ROWS_AT_ONCE = 512
"""Rows whose columns are updated at once: none depends on another."""

ROW_BYTES = 4 * 4
"""For each weight of these rows: copies in float32, errors, masks."""

COLUMNS_AT_ONCE = 128
"""Columns between two updates of all columns after them."""

Chooser = Callable[[Tensor, slice], Tensor]
"""Masks a group: its updated weights [out, M], and which columns they are -> bool [out, M]."""


def inverse_factor_(moment: Tensor, damping: float = DAMPING) -> None:
    """Replace a moment by the upper triangular U with U^T U = (moment + damping)^-1.

    Computed in float64. A channel that was always zero is treated as independent of the others.
    Damping grows tenfold as long as the matrix is not positive definite.

    Args:
        moment: float32 [channels, channels], symmetric; as it was where this raises.
        damping: relative to the mean of the diagonal.

    Raises:
        OfflineError: the moment is not finite, or no damping up to ``DAMPING_LIMIT`` helps.
    """
    if not moment.diagonal().isfinite().all():  # no other element is larger
        raise OfflineError(
            "the inputs of a layer are not finite during reconstruction: the model's activations "
            "overflow. Try --dtype float32, or a method without reconstruction."
        )
    diagonal = moment.diagonal().double()
    alive = diagonal > 0
    mean = diagonal[alive].mean() if alive.any() else diagonal.new_ones(())
    diagonal[~alive] = mean
    matrix = torch.empty_like(moment, dtype=torch.float64).t()  # LAPACK's own order
    while damping <= DAMPING_LIMIT:
        matrix.copy_(moment)
        matrix.diagonal().copy_(diagonal + (damping * mean).float())  # in the moment's precision
        if _factor_(matrix):
            moment.copy_(matrix)
            return
        logger.warning("the second moment of a layer's inputs is singular; damping x 10")
        damping *= 10
    raise OfflineError(
        f"the second moment of a layer's inputs is singular even with damping {DAMPING_LIMIT:g}: "
        "give more calibration text, or a method without reconstruction."
    )


def _factor_(matrix: Tensor) -> bool:
    """Replace a symmetric matrix by the upper factor of its inverse, each step in place.

    Returns whether it is positive definite; where it is not, the matrix is lost.
    """
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    if failed:
        return False
    torch.cholesky_inverse(matrix, out=matrix)
    torch.linalg.cholesky_ex(matrix, upper=True, out=(matrix, failed))
    return not failed


def update_columns(
    weight: Tensor, mask: Tensor | None, factor: Tensor, choose: Chooser | None, group: int
) -> tuple[Tensor, Tensor]:
    """Prune column by column and put each error on the columns after it.

    A group takes the errors of the columns before it when its turn comes, in one product, and
    columns are rows in memory here. So no column writes to all that come after it.

    Args:
        weight: float32 [out, channels], in the order in which columns are visited.
        mask: bool [out, channels], or None where ``choose`` makes it.
        factor: of ``inverse_factor_``, in the same order.
        choose: masks a group from its updated weights, or None for the given mask.
        group: columns per group; divides ``COLUMNS_AT_ONCE``.

    Returns:
        The updated weight, zero where pruned, and the mask.
    """
    columns = weight.t().clone(memory_format=torch.contiguous_format)
    kept = torch.empty_like(columns, dtype=torch.bool) if mask is None else mask.t().contiguous()
    diagonal = factor.diagonal().tolist()
    for start in range(0, len(columns), COLUMNS_AT_ONCE):
        stop = min(start + COLUMNS_AT_ONCE, len(columns))
        errors = torch.empty_like(columns[start:stop])
        for first in range(start, stop, group):
            after = first + group
            members = columns[first:after]
            members.addmm_(factor[start:first, first:after].t(), errors[: first - start], alpha=-1)
            if choose is not None:
                kept[first:after] = choose(members.t(), slice(first, after)).t()
            for column in range(first, after):
                error = errors[column - start]
                torch.div(columns[column].masked_fill(kept[column], 0), diagonal[column], out=error)
                columns[column + 1 : after].addr_(
                    factor[column, column + 1 : after], error, alpha=-1
                )
            members.masked_fill_(~kept[first:after], 0)
        columns[stop:].addmm_(factor[start:stop, stop:].t(), errors, alpha=-1)
    return columns.t(), kept.t()


def removal_damage(weight: Tensor, factor: Tensor, dead: Tensor) -> Tensor:
    """What the removal of each weight costs: (w / U_cc)^2, and nothing where the input is always 0.

    Args:
        weight: float32 [out, channels].
        factor: of ``inverse_factor_``, [channels, channels].
        dead: bool [channels], inputs that are always 0.
    """
    damage = (weight / factor.diagonal()).square()
    return damage.masked_fill_(dead, 0)


def least_damage(pattern: Pattern, factor: Tensor, dead: Tensor) -> Chooser:
    """SparseGPT's choice: keep the N weights of a group whose removal would cost most."""

    def choose(weights: Tensor, columns: slice) -> Tensor:
        damage = removal_damage(weights, factor[columns, columns], dead[columns])
        return keep_channels(damage.t().contiguous(), pattern).t()

    return choose


def update_kept_weights(work: LayerWork) -> LayerDecision:
    """Update the kept weights of a decoder layer under its masks, group by group."""
    inputs = LayerInputs(work)
    for group in work.decision:
        _update_group(work, inputs, group, choose=False)
    return work.decision


def choose_and_update(work: LayerWork) -> LayerDecision:
    """Choose the masks of a decoder layer anew while its weights are updated (SparseGPT)."""
    inputs = LayerInputs(work)
    return [_update_group(work, inputs, group, choose=True) for group in work.decision]


def _update_group(
    work: LayerWork, inputs: LayerInputs, group: GroupDecision, *, choose: bool
) -> GroupDecision:
    pattern, names = work.recipe.parsed_pattern(), list(group.masks)
    channels = linear_of(work.layer, names[0]).weight.shape[1]
    order = torch.arange(channels)
    if group.permutation is not None:
        order = absolute(group.permutation, group.layout.block_size)
    device = linear_of(work.layer, names[0]).weight.device
    moment = torch.zeros((channels, channels), dtype=torch.float32, device=device)
    add_second_moment(moment, inputs.of(group.layout.group), order)
    if not moment.diagonal().any():  # an expert that no token reached: by magnitude
        moment.fill_diagonal_(1)
    dead = moment.diagonal() == 0
    inverse_factor_(moment)
    factor = moment  # in its place
    order, back = order.to(device), order.argsort().to(device)
    chooser = least_damage(pattern, factor, dead) if choose else None
    masks, retained = dict(group.masks), dict(group.retained)
    for name in names:
        data = linear_of(work.layer, name).weight.data
        sums, packed = RetainedSums(), []
        for first in range(0, len(data), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            dense = data[rows].float()[:, order]
            mask = None
            if not choose:
                mask = unpack_mask(group.masks[name][rows]).to(device)[:, order]
            weight, mask = update_columns(dense, mask, factor, chooser, pattern.group)
            data[rows] = weight[:, back]
            if choose:
                for part in row_chunks(dense.shape):
                    sums.add(removal_damage(dense[part], factor, dead), mask[part])
                packed.append(pack_mask(mask[:, back].cpu()))
            del dense, weight, mask  # before the next ones are made
        if choose:
            masks[name], retained[name] = torch.cat(packed), sums.share
    return replace(group, masks=masks, retained=retained)
