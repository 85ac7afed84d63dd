"""The room for keys and values reaches every process that holds an engine."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.engines import server
from benchmarks.engines.kv_cache import KV_CACHE, kv_cache_environment, kv_cache_gib


@pytest.mark.parametrize(("value", "gib"), [(None, 1), ("", 1), ("4", 4)])
def test_the_environment_comes_first(
    value: str | None, gib: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KV_CACHE, raising=False)
    if value is not None:
        monkeypatch.setenv(KV_CACHE, value)
    assert kv_cache_gib() == gib
    assert kv_cache_environment() == {KV_CACHE: str(gib)}


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "much"])
def test_what_vllm_could_not_read_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KV_CACHE, value)
    with pytest.raises(ValueError, match="give a whole number, at least 1"):
        kv_cache_gib()


def test_servers_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []

    def refuse(*_: Any, env: dict[str, str], **__: Any) -> None:
        given.append(env[KV_CACHE])
        raise OSError("asked")

    monkeypatch.setenv(KV_CACHE, "7")
    monkeypatch.setattr(subprocess, "Popen", refuse)
    with pytest.raises(OSError, match="asked"), server.serve(tmp_path, log_path=tmp_path / "log"):
        pass
    assert given == ["7"]
