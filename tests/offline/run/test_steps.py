"""The folder in which a run keeps its finished steps."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from permllm_offline.errors import OfflineError
from permllm_offline.run.steps import Step, WorkFolder, is_at_work


def test_finished_steps_are_not_computed_again(tmp_path: Path) -> None:
    def fail() -> Step:
        raise AssertionError

    first = WorkFolder(tmp_path / "work", "a")
    tensors = {"x": torch.arange(6.0).reshape(2, 3).t()}
    first.step("one", lambda: Step(tensors, {"loss": 0.1}))
    first.release()
    again = WorkFolder(tmp_path / "work", "a").step("one", fail)
    assert torch.equal(again.tensors["x"], tensors["x"])
    assert again.facts == {"loss": 0.1}


def test_steps_of_another_run_are_refused_until_they_are_given_up(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", "seed: 1\nmethod: 'ria'") as work:
        work.step("one", Step)
    other = r"another recipe, model, data set or version \(seed is 1 there and 2 here\)"
    with pytest.raises(OfflineError, match=other):
        WorkFolder(tmp_path / "work", "seed: 2\nmethod: 'ria'")
    with WorkFolder(tmp_path / "work", "seed: 1\nmethod: 'ria'") as work:
        assert work.finished("one")
    with WorkFolder(tmp_path / "work", "seed: 2\nmethod: 'ria'", restart=True) as work:
        assert work.finished("one")
        work.begin()
        assert not work.finished("one")
    assert not (tmp_path / "work").exists()


def test_steps_of_the_same_run_are_gone_on_from_unless_they_are_given_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.begin()
        work.step("one", Step)
    for restart, found in ((False, True), (True, False)):
        with WorkFolder(tmp_path / "work", "a", restart=restart) as work:
            work.begin()
            assert work.finished("one") == found
            assert ("is left from a run that was cut off; removed" in caplog.text) == restart


def test_what_is_kept_is_listed_the_last_one_first(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        assert work.kept() == []
        for time, name in ((3, "a"), (1, "c"), (2, "b")):
            work.step(name, Step)
            os.utime(work.directory / f"{name}.safetensors", ns=(time, time))
        assert work.kept() == ["a", "b", "c"]


def test_what_is_removed_last_can_be_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path / "work", "a")
    for name in ("layer-0", "layer-1", "end"):
        work.step(name, Step)
    removed: list[str] = []
    monkeypatch.setattr(Path, "unlink", lambda path, **_: removed.append(path.stem))
    with pytest.raises(OfflineError, match="not empty"):
        work.remove()
    assert removed[:3] == ["end", "layer-1", "layer-0"]


def test_what_a_killed_run_was_writing_goes(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.step("one", Step)
        for name in (".tmpAbCdEf", "two.partial", "array"):
            (work.directory / name).write_bytes(b"a part")
    with WorkFolder(tmp_path / "work", "a") as work:
        work.begin()
        assert {path.name for path in work.directory.iterdir()} == {"lock", "one.safetensors"}


def test_a_folder_is_at_work_while_a_run_has_it(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    assert not is_at_work(folder)
    with WorkFolder(folder, "a") as work:
        work.step("one", Step)
        assert is_at_work(folder)
    assert not is_at_work(folder)
    assert work.finished("one")


def test_a_damaged_step_is_named(tmp_path: Path) -> None:
    WorkFolder(tmp_path / "work", "a").step("one", Step)
    (tmp_path / "work" / "one.safetensors").write_bytes(b"nothing")
    with pytest.raises(OfflineError, match=r"one\.safetensors is no finished step"):
        WorkFolder(tmp_path / "work", "a")


def test_an_interval_takes_the_place_of_the_last_and_goes_with_its_step(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path / "work", "a")
    assert work.interval("one") is None
    for number in (1, 2):
        work.keep_interval("one", Step(facts={"step": number}))
    work.release()
    again = WorkFolder(tmp_path / "work", "a")
    kept = again.interval("one")
    assert kept is not None
    assert kept.facts == {"step": 2}
    again.step("one", Step)
    assert again.interval("one") is None


def test_one_run_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.step("one", Step)
        with pytest.raises(OfflineError, match="another run to the same output is at work"):
            WorkFolder(tmp_path / "work", "a")
        assert work.finished("one")
    with WorkFolder(tmp_path / "work", "a") as again:
        assert again.finished("one")


def test_steps_of_another_identity_are_never_read(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "other", "b") as other:
        other.step("one", Step)
        other.keep_interval("two", Step())
    with WorkFolder(tmp_path / "work", "a") as work:
        for file in other.directory.glob("*.safetensors"):
            shutil.copy(file, work.directory)
        readings: list[Callable[[], object]] = [
            lambda: work.step("one", Step),
            lambda: work.read("one"),
            lambda: work.interval("two"),
        ]
        for reading in readings:
            with pytest.raises(OfflineError, match="another recipe, model, data set or version"):
                reading()


def test_steps_of_another_text_are_refused_before_work_begins(tmp_path: Path) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.begin("text")
        work.step("one", Step)
    with (
        WorkFolder(tmp_path / "work", "a") as again,
        pytest.raises(OfflineError, match=r"version \(the calibration text is another\)"),
    ):
        again.begin("other text")
    with WorkFolder(tmp_path / "work", "a") as again:
        again.begin("text")
        assert again.finished("one")


def test_an_interrupted_run_says_what_is_kept_and_how_to_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted(name: str, steps: int) -> None:
        with WorkFolder(tmp_path / name, "a") as work:
            work.begin()
            for number in range(steps):
                work.step(str(number), Step)
            raise KeyboardInterrupt

    for name, steps in (("kept", 1), ("empty", 0)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(name, steps)
    assert f"{tmp_path / 'kept'} keeps the finished steps: the same command goes" in caplog.text
    assert caplog.text.count("--restart") == 1
    assert not (tmp_path / "empty").exists()
    caplog.clear()
    with pytest.raises(ZeroDivisionError), WorkFolder(tmp_path / "kept", "b", restart=True):
        raise ZeroDivisionError  # before work begins: the steps are of another run
    assert not caplog.text


def test_an_interrupted_restart_goes_on_without_the_option(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def interrupted() -> None:
        with WorkFolder(tmp_path / "work", "a", restart=True) as work:
            work.begin()
            work.step("one", Step)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    (said,) = caplog.messages
    assert said.endswith("the same command without --restart goes on from them")


def test_leftovers_that_cannot_be_removed_are_not_taken_for_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with WorkFolder(tmp_path / "work", "a") as work:
        work.step("one", Step)

    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with WorkFolder(tmp_path / "work", "a", restart=True) as work:
        monkeypatch.setattr(Path, "unlink", refuse)
        for removal in (work.begin, work.remove):
            with pytest.raises(OfflineError, match=r"one\.safetensors .* cannot be removed \(Perm"):
                removal()
