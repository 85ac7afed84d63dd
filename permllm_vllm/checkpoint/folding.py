"""Folded permutations: moved into the output rows of the preceding linear.

If `y = p(x)` feeds a layer and `x` is what the preceding linear writes (nothing or only elementwise
functions in between), then reordering the rows of that linear once makes `p` free at run time. It
applies to every per-row tensor alike: weights, packed values, packed masks, scales, biases.
"""

from __future__ import annotations

from torch import Tensor

from permllm_vllm.checkpoint.permutation import channel_indices, inverse


def fold_rows(tensor: Tensor, local: Tensor, block_size: int) -> Tensor:
    """Return `new[j] = old[p[j]]` along dimension 0.

    [out, ...] and block-local uint8 [out] -> [out, ...]. Raises `CheckpointError` when the sizes
    differ or `out` is no multiple of `block_size`.
    """
    return tensor.index_select(0, channel_indices(tensor, 0, local, block_size))


def unfold_rows(tensor: Tensor, local: Tensor, block_size: int) -> Tensor:
    """Undo `fold_rows`."""
    return fold_rows(tensor, inverse(local, block_size), block_size)
