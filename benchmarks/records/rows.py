"""Rows of a long benchmark, kept in its result file: a run goes on where another was stopped."""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.records.machine import commit, require_comparable, revision, span, write_json

NOTHING: Mapping[str, Any] = MappingProxyType({})
STAMP = ("date", "commit")
"""What a row has of its making."""


class Rows:
    """The rows of a result file; each is written as soon as it is there.

    Each has the date and the commit of its making, so that a file may hold rows of several runs;
    those of the file are the newest row's. Rows of older files have none.

    Args:
        path: of the result, with the rows of earlier runs or none; None keeps them in memory only.
        facts: settings that all rows share, written in front of them.
        key: fields that tell one row from another.
        older: settings of all files that do not say them.

    Raises:
        ValueError: the file is no result with rows, or these were measured with other settings, on
            another CPU, or with other versions.
    """

    def __init__(
        self,
        path: Path | None,
        facts: Mapping[str, Any],
        key: Sequence[str],
        older: Mapping[str, Any] = NOTHING,
    ) -> None:
        self._path, self._facts, self._key = path, dict(facts), tuple(key)
        self._rows: list[dict[str, Any]] = []
        self._header: dict[str, Any] = {}
        self._begun = revision()
        if path is not None and path.exists():
            found = {**older, **_result(path)}
            require_comparable(found, self._facts, f"{path}: its rows have")
            self._rows = found["rows"]
            self._header = {name: found.get(name) for name in STAMP}

    @property
    def key(self) -> tuple[str, ...]:
        """Fields that tell one row from another."""
        return self._key

    def __contains__(self, values: Sequence[Any]) -> bool:
        """Whether a row with these values of the key's fields is there."""
        return self.get(values) is not None

    def __getitem__(self, values: Sequence[Any]) -> dict[str, Any]:
        """The row with these values of the key's fields; raises KeyError without one."""
        row = self.get(values)
        if row is None:
            raise KeyError(values)
        return row

    def get(self, values: Sequence[Any]) -> dict[str, Any] | None:
        """The row with these values of the key's fields, or None."""
        return next((row for row in self._rows if self._values(row) == tuple(values)), None)

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, or put it in the place of the one with its key, and write the file."""
        self.update([row])

    def update(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add several rows, and write the file once."""
        for row in rows:
            keys = [self._values(old) for old in self._rows]
            key = self._values(row)
            place = keys.index(key) if key in keys else len(keys)
            self._rows[place : place + 1] = [self._stamped(row)]
        self._write()

    def sort(self, place: Callable[[Mapping[str, Any]], Any]) -> None:
        """Order the rows by what `place` makes of each, and write the file if that moves any."""
        ordered = sorted(self._rows, key=place)
        if ordered != self._rows:
            self._rows = ordered
            self._write()

    def all(self) -> list[dict[str, Any]]:
        """Every row, in the order of the file."""
        return list(self._rows)

    def _stamped(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """The row with the date of today, and the commits from its first part or the run's start.

        A row that has a commit was completed from an older one.
        """
        today, now = datetime.date.today().isoformat(), revision()
        self._header = {"date": today, "commit": commit()}
        first = str(row.get("commit") or self._begun or now).partition("..")[0]
        return {**row, "date": today, "commit": span(first, now)}

    def _write(self) -> None:
        if self._path is not None:
            write_json(self._path, {**self._header, **self._facts, "rows": self._rows})

    def _values(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row.get(name) for name in self._key)


def _result(path: Path) -> dict[str, Any]:
    """What a file has; raises ValueError where it has no rows, or no machine that they are of."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): give another file") from error
    names = found if isinstance(found, dict) else {}
    missing = [name for name in ("machine", "versions", "rows") if name not in names]
    if missing:
        raise ValueError(
            f"{path} is no result with rows, it lacks {', '.join(missing)}: give another file"
        )
    return dict(names)
