"""Decisions that the bytes of a fuzzer's input make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Reads an input from front to back; past its end every decision is 0, the plain one."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        length = max((limit - 1).bit_length() + 7, 8) // 8
        return int.from_bytes(self.bytes(length), "little") % limit

    def pick(self, options: Sequence[T]) -> T:
        """One of the options; the first where the input has ended."""
        return options[self.below(len(options))]

    def once_in(self, limit: int) -> bool:
        """True for one of `limit` values of the next byte; False where the input has ended."""
        return self.below(limit) == limit - 1 and limit > 1

    def bytes(self, count: int) -> bytes:
        """`count` bytes, filled up with zeros."""
        found = self._data[self._at : self._at + count]
        self._at += count
        return found.ljust(count, b"\0")
