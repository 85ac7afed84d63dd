"""Rows of a JSON file: one object a line, or one array of objects, never read as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from json import JSONDecodeError, JSONDecoder
from pathlib import Path
from typing import TextIO

from permllm_offline.errors import OfflineError

_PART = 1 << 16
"""Characters of an array that are read at once."""

_DECODER = JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")


def json_rows(opened: TextIO, file: Path) -> Iterator[object]:
    """Yield the rows of an open file; it is an array where its first character is a bracket.

    Raises:
        OfflineError: what is read is no JSON.
    """
    first = opened.read(1)
    while first.isspace():
        first = opened.read(1)
    if first == "[":
        yield from _array_rows(opened, file)
    else:
        opened.seek(0)
        yield from _line_rows(opened, file)


def _line_rows(opened: TextIO, file: Path) -> Iterator[object]:
    for number, line in enumerate(opened, start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except JSONDecodeError as error:
                raise OfflineError(
                    f"{file}, line {number}: not JSON ({error.msg}). Each line must be one JSON "
                    "object, or the whole file one array of them."
                ) from error


def _array_rows(opened: TextIO, file: Path) -> Iterator[object]:
    """Rows of an array whose bracket was just read."""
    text, position, number, mark = "", 0, 1, ","
    while mark == ",":
        try:
            row, position, mark = _next_row(text, position)
        except JSONDecodeError as error:
            # The row may not be there as a whole. Reading as much again keeps long rows linear.
            more = opened.read(max(_PART, len(text) - position))
            if more:
                text, position = text[position:] + more, 0
                continue
            if number == 1 and text[position:].strip() == "]":
                return
            raise OfflineError(
                f"{file}, row {number}: not JSON ({error.msg}). A file that begins with a bracket "
                "must be one array of JSON objects."
            ) from error
        yield row
        number += 1
    _check_end(text[position:], opened, file)


def _check_end(rest: str, opened: TextIO, file: Path) -> None:
    """Raise OfflineError where anything but white space follows an array."""
    while not rest.strip():
        rest = opened.read(_PART)
        if not rest:
            return
    raise OfflineError(
        f"{file}: more follows the array ({rest.strip()[:20]!r}). A file that begins with a "
        "bracket must be one array of JSON objects to its end."
    )


def _next_row(text: str, position: int) -> tuple[object, int, str]:
    """The row at a position, what follows behind its mark, and that mark: a comma or the end."""
    row, end = _DECODER.raw_decode(text, _after_space(text, position))
    end = _after_space(text, end)
    mark = text[end : end + 1]
    if mark not in (",", "]"):
        raise JSONDecodeError("Expecting ',' delimiter", text, end)
    return row, end + 1, mark


def _after_space(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return position if found is None else found.end()
