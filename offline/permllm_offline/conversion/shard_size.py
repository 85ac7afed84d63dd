"""How large the files of a converted checkpoint are, since one of them is in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from permllm_offline.forecast.memory import SMALLEST_SHARD_BYTES


def shard_bytes(sizes: Mapping[str, int], stack: str) -> int:
    """Bytes of a file of the output at most: those of the largest decoder layer, as in a prune.

    Args:
        sizes: bytes of each tensor of the dense model by its name.
        stack: what the names of decoder layers begin with.
    """
    by_layer: Counter[str] = Counter()
    for name, size in sizes.items():
        if name.startswith(stack):
            by_layer[name.removeprefix(stack).partition(".")[0]] += size
    return max([SMALLEST_SHARD_BYTES, *by_layer.values()])
