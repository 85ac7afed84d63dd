"""How far channels were moved, where no block of the size that was asked for explains the zeros."""

from __future__ import annotations

from torch import Tensor

from permllm_offline.conversion.recovery import linked_channels
from permllm_vllm.checkpoint.pattern import Pattern
from permllm_vllm.checkpoint.schema import BLOCK_SIZES

MOST_CHANNELS = 4096
"""The null space of more channels takes minutes."""


class BlockSearch:
    """Looks at one group of linears, the first that nothing else explains: it costs a lot."""

    def __init__(self) -> None:
        self._looked_at: str | None = None
        self._parts: list[list[int]] = []

    def smallest_block(self, name: str, kept: Tensor, pattern: Pattern) -> int | None:
        """Find the smallest blocks that hold whole groups: a block size of the format, or `in`.

        Args:
            name: of the group in its model.
            kept: bool [rows, in], the same in every call with one name.
            pattern: N and M.

        Returns:
            None where the channels do not fall into groups of M of which every row keeps half,
            and where that cannot be told: another group was looked at, fewer rows than that
            needs, or too many channels.
        """
        if self._looked_at is None:
            self._looked_at, self._parts = name, _parts_of(kept)
        if name != self._looked_at:
            return None
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
