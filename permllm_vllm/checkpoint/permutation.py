"""The algebra of block-wise input permutations.

A permutation `p` moves channels inside blocks of `block_size`: `x_permuted[..., j] = x[..., p[j]]`.
It is stored *block-local*: uint8 [in], each entry the channel within its own block, so that a
tensor-parallel slice of whole blocks is itself a valid permutation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.pattern import Pattern


def is_bijective(local: Tensor, block_size: int) -> bool:
    """Tell whether every block holds each of 0 .. block_size - 1 once."""
    if local.dim() != 1 or local.numel() % block_size:
        return False
    channels = torch.arange(block_size, dtype=local.dtype, device=local.device)
    return bool((local.reshape(-1, block_size).sort(dim=1).values == channels).all())


def absolute(local: Tensor, block_size: int) -> Tensor:
    """Turn block-local uint8 [in] into channel numbers of the whole layer: int64 [in]."""
    return (_blocks(local, block_size).long() + _block_starts(local, block_size)).flatten()


def local(absolute: Tensor, block_size: int) -> Tensor:
    """Turn channel numbers of the whole layer, integer [in], into block-local uint8 [in].

    Raises `CheckpointError` when a channel leaves its block: the format cannot write that.
    """
    offsets = _blocks(absolute, block_size).long() - _block_starts(absolute, block_size)
    outside = ((offsets < 0) | (offsets >= block_size)).flatten().nonzero()
    if len(outside):
        position = int(outside[0])
        raise CheckpointError(
            f"permutation takes channel {int(absolute[position])} to position {position}; rule: "
            f"channels stay inside their block of {block_size}; remedy: permute within blocks (a "
            "permutation over all channels cannot be written in this format)"
        )
    return offsets.flatten().to(torch.uint8)


def inverse(local: Tensor, block_size: int) -> Tensor:
    """Return the permutation that undoes `local`, in its dtype: [in]."""
    return _blocks(local, block_size).argsort(dim=1).to(local.dtype).flatten()


def canonical(local: Tensor, block_size: int, pattern: Pattern) -> Tensor:
    """Return the canonical form: the same partition of channels into groups, in one fixed order.

    Channels ascend inside a group and the groups of a block ascend by their smallest channel, so
    equal partitions give equal bytes. uint8 [in] -> uint8 [in].
    """
    groups = _blocks(local, block_size).unflatten(1, (-1, pattern.group)).sort(dim=2).values
    order = groups[:, :, 0].argsort(dim=1)
    return groups.gather(1, order.unsqueeze(2).expand_as(groups)).flatten()


def permute_columns(weight: Tensor, local: Tensor, block_size: int) -> Tensor:
    """Return `weight[..., p]`: last dimension [in], for weights, masks and activations alike."""
    return weight.index_select(-1, channel_indices(weight, -1, local, block_size))


def unpermute_columns(weight: Tensor, local: Tensor, block_size: int) -> Tensor:
    """Undo `permute_columns`."""
    return permute_columns(weight, inverse(local, block_size), block_size)


def channel_indices(tensor: Tensor, dim: int, local: Tensor, block_size: int) -> Tensor:
    """Return the absolute indices of `local` on the device of `tensor`, sizes checked."""
    if tensor.shape[dim] != local.numel():
        raise CheckpointError(
            f"tensor {tuple(tensor.shape)} has {tensor.shape[dim]} channels in dimension {dim} and "
            f"the permutation {local.numel()}; rule: the two agree; remedy: use the permutation "
            "of this layer"
        )
    return absolute(local, block_size).to(tensor.device)


def _blocks(entries: Tensor, block_size: int) -> Tensor:
    """View [in] as [in / block_size, block_size]."""
    _check_whole_blocks(entries.numel(), block_size)
    return entries.reshape(-1, block_size)


def _block_starts(entries: Tensor, block_size: int) -> Tensor:
    """Return the first channel of every block, as a column: int64 [in / block_size, 1]."""
    return torch.arange(0, entries.numel(), block_size, device=entries.device).unsqueeze(1)


def _check_whole_blocks(in_features: int, block_size: int) -> None:
    if in_features % block_size:
        raise CheckpointError(
            f"{in_features} input channels; rule: a permuted layer has a multiple of the block "
            f"size {block_size}; remedy: use a smaller block size or leave the layer unpermuted"
        )
