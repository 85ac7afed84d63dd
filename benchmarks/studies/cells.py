"""The measurements of a study, written down one by one, so that a run that was cut off goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import machine, versions, write_json

Row = dict[str, Any]


class Cells:
    """The rows of one result file; each is measured once and written at once.

    Args:
        path: of the file. Rows that it holds already are kept if its facts, its versions and its
            processor are those of this run; else it is begun anew.
        facts: what every row depends on.
    """

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self._path, self._facts = path, dict(facts)
        self._rows: list[Row] = []
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            expected = self._facts | {"versions": versions(), "machine": machine()["cpu"]}
            there = {key: found.get(key) for key in expected}
            there["machine"] = found.get("machine", {}).get("cpu")
            if there == expected:
                self._rows = found["rows"]

    @property
    def rows(self) -> Sequence[Row]:
        """The rows so far, in the order in which they were measured."""
        return self._rows

    def row(self, key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
        """Return the row of a key, measured where it is not there.

        Args:
            key: what tells the row from the others; it becomes part of it.
            measure: gives the rest.
        """
        for row in self._rows:
            if all(name in row and row[name] == value for name, value in key.items()):
                return row
        row = {**key, **measure()}
        self._rows.append(row)
        partial = self._path.with_suffix(".partial")
        write_json(partial, self._facts | {"rows": self._rows})
        partial.replace(self._path)
        return row
