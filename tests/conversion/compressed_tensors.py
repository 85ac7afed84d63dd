"""Tensors that compressed-tensors wrote, beside what it was given.

`data/compressed_tensors.safetensors` was written by compressed-tensors 0.12.2 (`marlin-24` of its
versions 0.8.1 and 0.9.4 has the same bytes): random matrices, some groups of 4 with fewer than two
weights, as `Marlin24Compressor` and `Sparse24BitMaskCompressor` store them.
"""

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

WRITTEN = Path(__file__).parent / "data" / "compressed_tensors.safetensors"


def written(case: str) -> dict[str, Tensor]:
    """The tensors of a case by their kinds."""
    tensors = load_file(WRITTEN)
    return {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == case}
