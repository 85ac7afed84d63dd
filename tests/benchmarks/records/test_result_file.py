"""A command's file is refused before anything is made, and belongs to one run."""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from benchmarks.packages import cache_dir
from benchmarks.records import result_file
from benchmarks.records.result_file import held, kept_rows, new_result
from benchmarks.records.rows import Rows

HOLD = """
import argparse, sys
from pathlib import Path
from benchmarks.packages import cache_dir
from benchmarks.records import result_file
from benchmarks.records.result_file import held
with held(argparse.ArgumentParser(), Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(result_file, "cache_dir", cache_dir)


def refused(
    opened: Callable[[], AbstractContextManager[object]], capsys: pytest.CaptureFixture[str]
) -> str:
    with pytest.raises(SystemExit) as exit_, opened():
        pytest.fail("it goes on")
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_another_run_is_refused_while_one_writes(
    tmp_path: Path, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        said = refused(lambda: kept_rows(parser, path, {}, ["name"]), capsys)
        assert "another run writes it" in said
        with kept_rows(parser, tmp_path / "other.json", {}, ["name"]) as rows:
            rows.add({"name": "a"})
        other.communicate()
    with kept_rows(parser, path, {}, ["name"]) as rows:
        rows.add({"name": "a"})
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "cache", "other.json", "result.json"
    ]  # fmt: skip


def test_without_a_file_nothing_is_held(tmp_path: Path, parser: argparse.ArgumentParser) -> None:
    with held(parser, None), held(parser, None):
        assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is no JSON"),
        ("[]", "lacks machine, versions, rows"),
        (json.dumps({"machine": {}, "versions": {}, "steps": []}), "it lacks rows: give another"),
    ],
)
def test_a_file_without_rows_ends_the_command(
    text: str,
    said: str,
    tmp_path: Path,
    parser: argparse.ArgumentParser,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "result.json"
    path.write_text(text)
    assert said in refused(lambda: kept_rows(parser, path, {}, ["name"]), capsys)
    assert path.read_text() == text


def test_rows_of_other_settings_end_the_command(
    tmp_path: Path, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    Rows(path, {"windows": 2}, ["name"]).add({"name": "a"})
    said = refused(lambda: kept_rows(parser, path, {"windows": 3}, ["name"]), capsys)
    assert "windows 2, this run has 3" in said


def test_what_is_written_as_a_whole_is_not_replaced(
    tmp_path: Path, parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    with new_result(parser, path):
        path.write_text("{}")
    assert "result.json is there" in refused(lambda: new_result(parser, path), capsys)
