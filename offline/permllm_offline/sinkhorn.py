"""Soft permutations by Sinkhorn normalisation, and the hard permutation nearest to one."""

from __future__ import annotations

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


def sinkhorn(logits: Tensor, temperature: float, iterations: int) -> Tensor:
    """Normalise exp(logits / temperature) towards a doubly stochastic matrix.

    Rows, then columns, ``iterations`` times, all in log space, so that no logit overflows
    (Eq. 2-5 of arXiv 2510.10136). Without iterations only the rows sum to one.

    Args:
        logits: float [blocks, block_size, block_size].
        temperature: positive; towards 0 the result is a permutation.
        iterations: of the pair of normalisations.

    Returns:
        [blocks, block_size, block_size], differentiable.
    """
    log_soft = logits / temperature
    if iterations == 0:
        return log_soft.softmax(dim=-1)
    for _ in range(iterations):
        log_soft = log_soft.log_softmax(dim=-1).log_softmax(dim=-2)
    return log_soft.exp()


def harden(soft: Tensor) -> Tensor:
    """Find, for each block, the permutation P that maximises trace(P^T soft) (Eq. 6).

    Where the largest entry of every column lies in another row, those entries are the answer;
    only the other blocks need an assignment.

    Args:
        soft: [blocks, block_size, block_size], rows are channels and columns positions.

    Returns:
        int64 [blocks, block_size] on the CPU: position -> channel.
    """
    soft = soft.detach().float().cpu()
    order = soft.argmax(dim=1)
    channels = torch.arange(soft.shape[1])
    unclear = (order.sort(dim=1).values != channels).any(dim=1).nonzero().flatten()
    # By column, so that the answer is position -> channel as it comes.
    for block, scores in zip(unclear, soft[unclear].transpose(1, 2).numpy(), strict=True):
        order[block] = torch.from_numpy(linear_sum_assignment(scores, maximize=True)[1])
    return order
