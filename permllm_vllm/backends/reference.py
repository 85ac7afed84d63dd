"""Plain PyTorch on any device: the weight is decompressed once and multiplied as a dense one.

Exact, with no gain in memory or time: the oracle, and the fallback where no kernel exists.
"""

from __future__ import annotations

import torch

from permllm_vllm.backends.weights import CheckpointWeights, PackedWeights
from permllm_vllm.checkpoint import packing, permutation


class ReferenceBackend:
    """Packs to the dense weight `[out, in]`, permutation undone and scale applied."""

    name = "reference"
    instruction_set = "pytorch"

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype

    def pack(self, weights: CheckpointWeights) -> PackedWeights:
        """Decompresses one layer to the dtype of the model."""
        values = weights.values
        if weights.scale is not None:
            values = values.float() * weights.scale.float().unsqueeze(1)
        dense = packing.unpack(values.to(self.dtype), weights.mask)
        if weights.permutation is not None:
            dense = permutation.unpermute_columns(dense, weights.permutation, weights.block_size)
        return PackedWeights(dense.contiguous())
