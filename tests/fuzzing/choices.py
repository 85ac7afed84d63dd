"""Decisions that the bytes of a fuzzer's input make, and damage that they choose."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 32, 48, 64, 128, 255, 256, 2**31, 2**63, 2**64, 1.0, 64.0,
    1e308, float("nan"), float("inf"), "", "1", "64", "2:4", "4:8", "1:4", "2:4\n", "int8", "int4",
    "bfloat16", "float16", "float32", "float64", "permllm", "awq", "..", "../a.safetensors",
    "/etc/passwd", "a.safetensors", "model.safetensors", "a\0", "\ud800", "\x1b[2J", "ä" * 2000,
    "re:", "re:(", "re:.*", "re:(a|a)*b", "re:a{9999999999}", "re:(?=a)", "re:model\\..*", [], {},
    [[]], ["a", "a"], [1], ["re:["], ["re:.*"], {"a": 1}, [None],
)  # fmt: skip
SLIPS = (b'"', b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\0", b"\xff", b"9", b"-", b"e", b" ")


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


def damaged_json(choices: Choices, document: Any, edits: int) -> Any:
    """A copy of a document in which up to `edits` nodes are replaced, removed or renamed."""
    holder = [copy.deepcopy(document)]
    for _ in range(edits):
        place: Any = holder
        key: Any = 0
        while isinstance(place[key], (dict, list)) and place[key] and not choices.once_in(4):
            place = place[key]
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = choices.pick(keys)
        how = choices.below(4)
        if how == 0 or place is holder:
            place[key] = copy.deepcopy(choices.pick(ODD_VALUES))
        elif how == 1:
            del place[key]
        elif how == 2 and isinstance(place, dict):
            place[str(choices.pick(ODD_VALUES))] = place.pop(key)
        elif isinstance(place, dict):
            place[str(choices.pick(ODD_VALUES))] = copy.deepcopy(choices.pick(ODD_VALUES))
        else:
            place.insert(key, copy.deepcopy(choices.pick([*place, *ODD_VALUES])))
    return holder[0]


def damaged_bytes(choices: Choices, content: bytes, edits: int) -> bytes:
    """The bytes with up to `edits` flips, slips, cuts, doublings and swaps."""
    damaged = bytearray(content)
    for _ in range(edits):
        at = choices.below(len(damaged) + 1)
        how = choices.below(6)
        if how == 0 and at < len(damaged):
            damaged[at] ^= 1 << choices.below(8)
        elif how == 1:
            damaged[at:at] = choices.pick(SLIPS)
        elif how == 2:
            del damaged[at : at + 1 + choices.below(16)]
        elif how == 3:
            damaged[at:at] = damaged[at : at + 1 + choices.below(64)]
        elif how == 4 and at < len(damaged):
            damaged[at] = choices.below(256)
        else:
            del damaged[at:]
    return bytes(damaged)


def encoded(document: Any) -> bytes:
    """JSON as bytes; lone surrogates stay escaped."""
    return json.dumps(document).encode()
