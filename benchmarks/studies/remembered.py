"""Measurements that several studies share, kept in the cache."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.packages import cache_dir
from benchmarks.records.machine import machine, versions
from benchmarks.records.sources import sources_digest


def remembered(key: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Return what was measured for a key with these sources and versions on this CPU, once.

    Args:
        key: everything that decides the measurement, as JSON can hold it.
        measure: gives what JSON can hold.
    """
    everything = {
        "key": key,
        "sources": sources_digest(),
        "versions": versions(),
        "cpu": machine()["cpu"],
    }
    digest = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()
    path = cache_dir() / "studies" / f"{digest[:32]}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    found = dict(measure())
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(found), encoding="utf-8")
    partial.replace(path)
    return found
