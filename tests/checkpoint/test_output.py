import os
import shutil
from collections import namedtuple
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from permllm_vllm.checkpoint.errors import CheckpointError
from permllm_vllm.checkpoint.output import (
    check_destination,
    check_disk,
    check_outside,
    replaced_at_the_end,
)

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


def checkpoint(directory: Path, weights: str = "model.safetensors") -> Path:
    """Make a directory that passes for a checkpoint."""
    directory.mkdir()
    for name in ("config.json", weights):
        (directory / name).touch()
    return directory


def test_absent_and_empty_outputs_are_free(tmp_path: Path, source: Path) -> None:
    check_destination(tmp_path / "absent", source, force=False)
    (tmp_path / "empty").mkdir()
    check_destination(tmp_path / "empty", source, force=False)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.safetensors.index.json"])
def test_a_filled_output_needs_force(tmp_path: Path, source: Path, weights: str) -> None:
    output = checkpoint(tmp_path / "out", weights)
    with pytest.raises(CheckpointError, match=r"not empty.*--force"):
        check_destination(output, source, force=False)
    check_destination(output, source, force=True)


def test_force_replaces_checkpoints_alone(tmp_path: Path, source: Path) -> None:
    output = tmp_path / "out"
    (output / "model" / "config.json").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"holds no config\.json; rule: only a checkpoint"):
        check_destination(output, source, force=True)


@pytest.mark.parametrize("other", ["package.json", "weights.safetensors", "checkpoint.bin"])
def test_a_config_alone_is_no_checkpoint(tmp_path: Path, source: Path, other: str) -> None:
    output = checkpoint(tmp_path / "out", other)
    message = r"holds no model\.safetensors or model\.safetensors\.index\.json; rule: only a check"
    with pytest.raises(CheckpointError, match=message):
        check_destination(output, source, force=True)


def test_what_is_read_lies_outside_the_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    check_outside(output, "data set", tmp_path / "out.txt")
    (tmp_path / "link").symlink_to(output)
    for path in (output / "a.txt", tmp_path / "link" / "a.txt", output):
        with pytest.raises(CheckpointError, match=r"contains the data set .*choose another"):
            check_outside(output, "data set", path)


@pytest.mark.parametrize("place", ["out", "out/inside"])
def test_the_current_directory_is_no_output(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Even an empty one: it would be another folder afterwards, and the old one gone."""
    (tmp_path / place).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / place)
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"contains the current directory .*choose"):
            check_destination(tmp_path / "out", source, force=force)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "inside").mkdir(exist_ok=True)
    (tmp_path / "out" / "inside").rmdir()
    check_destination(tmp_path / "out", source, force=False)


def test_a_file_is_no_output(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        check_destination(tmp_path / "out", source, force=True)


def test_a_mount_point_is_no_output(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (tmp_path / "link").symlink_to(output)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == output)
    for name in (output, tmp_path / "link"):
        with pytest.raises(CheckpointError, match=r"is a mount point; .*give a folder inside it"):
            check_destination(name, source, force=True)
    check_destination(output / "sparse", source, force=False)


def test_the_source_is_no_output_by_any_name(tmp_path: Path, source: Path) -> None:
    os.symlink(source, tmp_path / "link")
    for output in (source, tmp_path / "link", tmp_path / "x" / ".." / "source"):
        with pytest.raises(CheckpointError, match="output and source are both"):
            check_destination(output, source, force=True)


def test_force_never_removes_more_than_a_checkpoint(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="contains the source directory"):
        check_destination(tmp_path, source, force=True)
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    with pytest.raises(CheckpointError, match="contains the current directory"):
        check_destination(tmp_path / "work", source, force=True)
    monkeypatch.setenv("HOME", str(tmp_path / "homes" / "me"))
    (tmp_path / "homes" / "me").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="contains the home directory"):
        check_destination(tmp_path / "homes", source, force=True)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # nobody's home
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        check_destination(tmp_path / "homes", source, force=True)


def test_a_small_disk_is_refused_with_both_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def usage(path: Path) -> Any:
        asked.append(path)
        return Usage(10**10, 0, 10**9)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    check_disk(tmp_path / "not" / "yet", 10**9)
    with pytest.raises(CheckpointError, match=r"1\.00 GB free.*may take 2\.50 GB.*free some space"):
        check_disk(tmp_path / "not" / "yet", 2_500_000_000)
    assert asked == [tmp_path, tmp_path]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1, 0, 0))
    with pytest.raises(CheckpointError, match=r"0\.00 MB free.*may take 0\.25 MB"):
        check_disk(tmp_path, 250_000)


def test_the_output_appears_at_the_end(tmp_path: Path) -> None:
    with replaced_at_the_end(tmp_path / "a" / "out", force=False) as directory:
        (directory / "file").write_text("new")
        assert not (tmp_path / "a" / "out").exists()
    assert (tmp_path / "a" / "out" / "file").read_text() == "new"
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]


def test_an_empty_output_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with replaced_at_the_end(tmp_path / "out", force=False) as directory:
        (directory / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "new"


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("kind", ["directory", "file"])
def test_what_appeared_during_the_write_stays(tmp_path: Path, kind: str, force: bool) -> None:
    mine = tmp_path / "out" if kind == "file" else tmp_path / "out" / "mine"
    with ExitStack() as stack:
        directory = stack.enter_context(replaced_at_the_end(tmp_path / "out", force=force))
        (directory / "file").write_text("new")
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(
            CheckpointError, match=r"nothing but an empty .*; remedy: rename it"
        ) as raised:
            stack.close()
    assert mine.read_text() == "mine"
    assert f"complete in {directory}, but" in str(raised.value)
    assert (directory / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_failed_swap_puts_the_old_output_back_and_keeps_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = checkpoint(tmp_path / "out")
    (output / "file").write_text("old")
    rename = Path.rename

    def refuse_the_new(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse_the_new)
    with (
        pytest.raises(
            CheckpointError, match=r"complete in .* renamed to .*out: no; rule"
        ) as raised,
        replaced_at_the_end(output, force=True) as directory,
    ):
        (directory / "file").write_text("new")
    (partial,) = tmp_path.glob(".out.*")
    assert f"complete in {partial}, but" in str(raised.value)
    assert (partial / "file").read_text() == "new"
    assert (output / "file").read_text() == "old"


def test_what_is_not_on_the_disk_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(os, "fsync", refuse)
    with (
        pytest.raises(CheckpointError, match=r"writing .*out failed: no"),
        replaced_at_the_end(tmp_path / "out", force=False),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_all_is_on_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    rename = Path.rename

    def note(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    def note_rename(self: Path, target: Path) -> Path:
        synced.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(Path, "rename", note_rename)
    with replaced_at_the_end(tmp_path / "out", force=False) as directory:
        (directory / "templates").mkdir()
        (directory / "templates" / "file").touch()
        (directory / "weights").touch()
    inside = [directory, *(directory / name for name in ("weights", "templates"))]
    inside.append(directory / "templates" / "file")
    *before, renamed, parent = synced
    assert sorted(before) == sorted(map(str, inside))
    assert (renamed, parent) == ("renamed", str(tmp_path))


def test_leftovers_of_a_killed_write_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.more.0123abcd.partial").mkdir()  # of another output
    with replaced_at_the_end(tmp_path / "out", force=False):
        pass
    assert ".out.0123abcd.partial" in caplog.text
    assert ".out.more" not in caplog.text
    assert (tmp_path / "out").is_dir()


def test_what_a_killed_replacement_left_is_renamed_back_or_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = tmp_path / ".out.0123abcd.replaced"
    old.mkdir()
    with replaced_at_the_end(tmp_path / "out", force=False):
        assert f"{old} is what was in" in caplog.text
        assert caplog.text.rstrip().endswith("cut off; rename it back")
    with replaced_at_the_end(tmp_path / "out", force=False):
        assert caplog.text.rstrip().endswith("was replaced in " + f"{tmp_path / 'out'}; remove it")
    assert old.is_dir()
