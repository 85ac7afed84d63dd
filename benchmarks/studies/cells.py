"""The measurements of a study, written down one by one, so that a run that was cut off goes on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.records.rows import STAMP, Rows

Row = dict[str, Any]


class Cells:
    """The rows of one result file, each measured once and written at once; see ``Rows``."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    @property
    def rows(self) -> Sequence[Row]:
        """The rows so far, in the order in which they were measured."""
        return self._rows.all()

    def row(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
        """Return the row of a key, measured where it is not there.

        Args:
            key: the fields that tell the row from the others, some or all; part of the row.
            measure: gives the rest; with a date and a commit if it is remembered.
        """
        values = tuple(key.get(name) for name in self._rows.key)
        if values not in self._rows:
            row = {**key, **measure()}
            add = self._rows.keep if set(STAMP) <= set(row) else self._rows.add
            add(row)
        return self._rows[values]

    def sort(self, place: Callable[[Mapping[str, Any]], Any]) -> None:
        """Order the rows by what ``place`` makes of each."""
        self._rows.sort(place)
