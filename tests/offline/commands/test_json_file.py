import errno
import json
import os
from pathlib import Path

import pytest

from permllm_offline.cli import main


@pytest.mark.parametrize("command", ["doctor", "plan", "eval", "inspect", "convert"])
def test_a_json_file_that_cannot_be_written_is_named_before_any_work(
    command: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = [command, *([] if command == "doctor" else [str(tmp_path / "no-model")])]
    line += ["--output", str(tmp_path / "out")] if command == "convert" else []
    for file in (tmp_path / "nowhere" / "result.json", tmp_path, text_file / "result.json"):
        assert main([*line, "--json", str(file)]) == 2
        shown = capsys.readouterr()
        assert f"--json {file} cannot be written" in shown.err
        assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_result_is_shown_before_it_is_written(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    arguments = ("--dataset", str(text_file), "--sequence-length", "24", "--max-windows", "2")
    result = ("--json", str(tmp_path / "result.json"))
    assert main(["eval", str(tiny_model_directory), *arguments, *result]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["windows"] == 2
    assert "No space left" in shown.err
