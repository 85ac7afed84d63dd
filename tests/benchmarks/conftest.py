"""Locks of the results that tests write lie beside these, not in the user's cache."""

import pytest

from benchmarks.records import result_file


@pytest.fixture(autouse=True)
def _locks_apart(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(result_file, "cache_dir", tmp_path_factory.getbasetemp)
