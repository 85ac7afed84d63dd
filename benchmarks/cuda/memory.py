"""What generation takes of a GPU's memory, and how many decoder layers fit."""

from __future__ import annotations

import dataclasses

from benchmarks.cuda.contestants import SPARSE_BYTES
from benchmarks.cuda.llama import Shape

GIB = 1 << 30
DENSE_BYTES = 2  # per weight and number of a cache
RESERVE = 5 * GIB // 2
"""For pruning gate_up of Llama-2-7B (22 bytes a weight), and what PyTorch takes beside tensors."""


def layer_bytes(shape: Shape, sequences: int, length: int) -> int:
    """Of a decoder layer in 16 bits: its weights, dense and packed, and the cache of one model."""
    rows = shape.head_dim * (shape.num_attention_heads + shape.num_key_value_heads)
    weights = shape.hidden_size * (2 * rows + 3 * shape.intermediate_size)
    cached = 2 * sequences * length * shape.num_key_value_heads * shape.head_dim
    return int(weights * (DENSE_BYTES + SPARSE_BYTES)) + cached * DENSE_BYTES


def other_bytes(shape: Shape, sequences: int, prompt: int) -> int:
    """Embedding and head, log-probabilities of two models as they are compared, and RESERVE."""
    embedded = 2 * shape.vocab_size * shape.hidden_size * DENSE_BYTES
    compared = 4 * sequences * prompt * shape.vocab_size * 4  # two, their difference, its magnitude
    return embedded + compared + RESERVE


def fitting(shape: Shape, free: int, sequences: int, prompt: int, length: int) -> Shape:
    """The same with no more decoder layers than `free` bytes hold.

    Args:
        shape: of the model.
        free: bytes of GPU memory.
        sequences: most at a time.
        prompt: tokens of each whose log-probabilities are compared.
        length: tokens of each that the cache holds.

    Raises:
        SystemExit: not one fits.
    """
    others, each = other_bytes(shape, sequences, prompt), layer_bytes(shape, sequences, length)
    layers = (free - others) // each
    if layers < 1:
        raise SystemExit(
            f"{free / GIB:.1f} GiB of GPU memory are free, and one decoder layer for {sequences} "
            f"sequences takes {(others + each) / GIB:.1f} with all beside it: end what else uses "
            "the GPU, or pass fewer --sequences"
        )
    return dataclasses.replace(shape, num_hidden_layers=min(layers, shape.num_hidden_layers))
