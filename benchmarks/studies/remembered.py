"""Measurements that several studies share, kept in the cache."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.packages import cache_dir
from benchmarks.records.machine import machine, revision, span, versions
from benchmarks.records.sources import PACKAGES, ROOT, sources_digest

MEASURING = (*PACKAGES, ROOT / "benchmarks" / "studies")
"""What decides a measurement."""


def remembered(key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured for a key with these sources and versions on this CPU, once.

    With the date and the commit of measuring, as ``Rows.keep`` takes them.

    Args:
        key: everything that decides the measurement, as JSON can hold it.
        measure: gives what JSON can hold.
    """
    everything = {
        "key": key,
        "sources": sources_digest(MEASURING),
        "versions": versions(),
        "cpu": machine()["cpu"],
    }
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "studies" / f"{digest[:32]}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    begun = revision()
    measured = dict(measure())
    stamp = {"date": datetime.date.today().isoformat(), "commit": span(begun, revision())}
    found = {**measured, **stamp}
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)
    return found
