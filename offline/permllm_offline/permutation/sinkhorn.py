"""Soft permutations by Sinkhorn normalisation."""

from __future__ import annotations

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
