"""The hard permutation nearest to a soft one, solved only where it can have changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

PROOF_ROUNDS = 8
"""Rounds in which the last assignment must prove itself; a new solution costs about as much."""


def harden(soft: Tensor) -> Tensor:
    """Find, for each block, the permutation P that maximises trace(P^T soft) (Eq. 6).

    Args:
        soft: [blocks, block_size, block_size], rows are channels and columns positions.

    Returns:
        int64 [blocks, block_size] on the CPU: position -> channel.
    """
    return Hardener()(soft)


class Hardener:
    """Hardens the soft permutations of one learning step after the other.

    Where the largest entry of every column lies in another row, those entries are the answer.
    Else the answer of the step before stays where it is still the best one, which dual variables
    prove. Only the blocks that are left are solved, in parallel: scipy's solver does not hold the
    interpreter. ``solved`` counts them.
    """

    def __init__(self) -> None:
        self.solved = 0
        self._order: Tensor | None = None
        self._potentials: Tensor | None = None

    def __call__(self, soft: Tensor) -> Tensor:
        """Like ``harden``; ``soft`` has the same shape in every call."""
        soft = soft.detach().float().cpu()
        order = soft.argmax(dim=1)
        channels = torch.arange(soft.shape[1])
        open_blocks = (order.sort(dim=1).values != channels).any(dim=1).nonzero().flatten()
        if self._potentials is None:
            self._potentials = torch.zeros(soft.shape[:2])
        if self._order is not None and len(open_blocks):
            last = self._order[open_blocks]
            proven, potentials = prove_best(soft[open_blocks], last, self._potentials[open_blocks])
            order[open_blocks[proven]] = last[proven]
            self._potentials[open_blocks[proven]] = potentials[proven]
            open_blocks = open_blocks[~proven]
        order[open_blocks] = solve(soft[open_blocks])
        self._potentials[open_blocks] = 0.0
        self.solved += len(open_blocks)
        self._order = order
        return order.clone()


def solve(soft: Tensor) -> Tensor:
    """Assign by scipy, one block per task of a thread pool.

    Args:
        soft: float32 [blocks, block_size, block_size], rows are channels and columns positions.

    Returns:
        int64 [blocks, block_size]: position -> channel.
    """
    if len(soft) == 0:
        return torch.empty(soft.shape[:2], dtype=torch.int64)

    # By column, so that the answer is position -> channel as it comes.
    def solve_one(scores: Tensor) -> Tensor:
        return torch.from_numpy(linear_sum_assignment(scores.numpy(), maximize=True)[1])

    blocks = soft.transpose(1, 2).unbind()
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.stack(list(pool.map(solve_one, blocks)))


def prove_best(soft: Tensor, order: Tensor, potentials: Tensor) -> tuple[Tensor, Tensor]:
    """Try to prove that each block's permutation maximises trace(P^T soft).

    A permutation is the best one if and only if there are potentials u with
    ``u[i] >= u[k] + soft[i, j] - soft[k, j]`` for all channels i and all positions j, k being the
    channel at j (the dual of the assignment problem). They are sought by a few rounds of
    Bellman and Ford's algorithm, from those that held in the step before.

    Args:
        soft: float32 [blocks, block_size, block_size], rows are channels and columns positions.
        order: int64 [blocks, block_size], position -> channel.
        potentials: float32 [blocks, block_size], to begin with.

    Returns:
        bool [blocks], whether it is proven, and the potentials after the last round. What is not
        proven may be the best one all the same.
    """
    by_holder = soft.gather(2, order.argsort(dim=1)[:, None, :].expand_as(soft))
    gain = by_holder - by_holder.diagonal(dim1=1, dim2=2)[:, None, :]
    proven = torch.zeros(len(soft), dtype=torch.bool)
    for _ in range(PROOF_ROUNDS):
        raised = (potentials[:, None, :] + gain).amax(dim=2)
        proven = (raised <= potentials).all(dim=1)
        potentials = raised
        if bool(proven.all()):
            break
    return proven, potentials
