"""How far channels were moved, where no block of the size that was asked for explains the zeros."""

from __future__ import annotations

from torch import Tensor

from permllm_offline.conversion.recovery import linked_channels
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import BLOCK_SIZES

MOST_CHANNELS = 4096
"""The null space of more channels takes minutes."""


class Reach:
    """Looks at one group of linears, the first that nothing else explains: it costs a lot."""

    def __init__(self) -> None:
        self._parts: list[list[int]] | None = None

    def smallest_block(self, kept: Tensor, pattern: Pattern) -> int | None:
        """Find the smallest blocks that hold whole groups: a block size of the format, or `in`.

        Args:
            kept: bool [rows, in]; looked at in the first call only.
            pattern: N and M.

        Returns:
            None where the channels do not fall into groups of M of which every row keeps half,
            and where that cannot be told: fewer rows than that needs, or too many channels.
        """
        if self._parts is None:
            self._parts = _parts_of(kept)
        if not self._parts or any(len(part) > pattern.group for part in self._parts):
            return None
        channels = sum(map(len, self._parts))
        for size in BLOCK_SIZES:
            whole = all(part[0] // size == part[-1] // size for part in self._parts)
            if whole and channels % size == 0:
                return size
        return channels


def _parts_of(kept: Tensor) -> list[list[int]]:
    channels = kept.shape[1]
    rows = kept[kept.sum(dim=1) * 2 == channels]
    if channels > MOST_CHANNELS or len(rows) < channels - channels // 8:
        return []
    return [part.channels for part in linked_channels(rows)]
