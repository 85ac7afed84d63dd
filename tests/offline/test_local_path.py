"""``~`` stands for a home directory where there is one, and never causes a traceback."""

from pathlib import Path

import pytest

from permllm_offline.cli import main
from permllm_offline.local_path import local_path
from permllm_offline.text.texts import documents

NOBODY = "~no-such-user/model"


def test_a_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.txt").write_text("mine", encoding="utf-8")
    assert local_path("~/x.txt") == local_path(Path("~/x.txt")) == tmp_path / "x.txt"
    assert local_path("a/~/b") == Path("a/~/b")
    assert list(documents("~/x.txt")) == ["mine"]


def test_the_home_of_nobody_is_a_name_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert local_path(NOBODY) == Path(NOBODY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / NOBODY).parent.mkdir()
    (tmp_path / NOBODY).write_text("odd", encoding="utf-8")
    assert list(documents(NOBODY)) == ["odd"]


@pytest.mark.parametrize(
    "arguments",
    [("plan", NOBODY), ("prune", NOBODY, "--output", "out"), ("eval", NOBODY, "--dataset", "x")],
)
def test_a_model_in_the_home_of_nobody_is_refused(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert repr(NOBODY) in capsys.readouterr().err
