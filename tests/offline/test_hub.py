"""Uploading is opt-in, checked before the work, and never loses a finished checkpoint."""

import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest

from permllm_offline import api
from permllm_offline.cli import main
from permllm_offline.recipe import make_recipe

REPOSITORY = "someone/tiny-2to4"
URL = f"https://huggingface.co/{REPOSITORY}/commit/0"


class PretendedHub:
    """Records what is asked of `HfApi`; `broken` methods fail."""

    def __init__(self, *broken: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self._broken = broken

    def _call(self, name: str, details: Any) -> None:
        self.calls.append((name, details))
        if name in self._broken:
            raise OSError(f"no {name} today")

    def whoami(self) -> None:
        self._call("whoami", None)

    def create_repo(self, repository: str, **options: Any) -> None:
        self._call("create_repo", (repository, options))

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        files = sorted(path.name for path in Path(options["folder_path"]).iterdir())
        assert options["delete_patterns"] == ["*.safetensors", "*.safetensors.index.json"]
        self._call("upload_folder", (options["repo_id"], files))
        return SimpleNamespace(commit_url=URL)


def prune(model: Path, output: Path, *more: str) -> int:
    return main(["prune", str(model), "--output", str(output), "--method", "magnitude", *more])


def pretend(monkeypatch: pytest.MonkeyPatch, *broken: str) -> PretendedHub:
    hub = PretendedHub(*broken)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    return hub


def test_a_finished_checkpoint_is_uploaded(
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub = pretend(monkeypatch)
    output = tmp_path / "out"
    assert prune(tiny_model_directory, output, "--push-to-hub", REPOSITORY) == 0
    written = sorted(path.name for path in output.iterdir())
    assert hub.calls == [
        ("whoami", None),
        ("create_repo", (REPOSITORY, {"private": True, "exist_ok": True})),
        ("upload_folder", (REPOSITORY, written)),
    ]
    assert {"model.safetensors", "README.md", "SHA256SUMS"} <= set(written)
    assert URL in capsys.readouterr().out


@pytest.mark.parametrize("is_first", [True, False])
def test_the_first_process_uploads_and_has_the_address(
    is_first: bool,
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub = pretend(monkeypatch)
    monkeypatch.setattr(api, "first", lambda: is_first)
    caplog.set_level("INFO", api.__name__)
    recipe = make_recipe({"model": str(tiny_model_directory), "method": "magnitude"})
    report, address = api.prune_and_push(recipe, tmp_path / "out", push_to_hub=REPOSITORY)
    assert report.recipe.method == "magnitude"
    assert address == (URL if is_first else None)
    assert (URL in caplog.text) == is_first
    uploads = [name for name, _ in hub.calls]
    assert uploads == (["create_repo", "upload_folder"] if is_first else [])


def test_the_function_uploads_as_the_command_does(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_command, by_function = pretend(monkeypatch), PretendedHub()
    assert prune(tiny_model_directory, tmp_path / "one", "--push-to-hub", REPOSITORY) == 0
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: by_function)
    api.prune(tiny_model_directory, tmp_path / "two", method="magnitude", push_to_hub=REPOSITORY)
    assert by_function.calls == by_command.calls


def test_nothing_is_uploaded_unasked(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("the network was used")

    hub = pretend(monkeypatch, "whoami", "create_repo", "upload_folder")
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert prune(tiny_model_directory, tmp_path / "out") == 0
    assert hub.calls == []


def test_a_dry_run_uploads_nothing(
    tmp_path: Path, tiny_model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pretend(monkeypatch)
    options = ("--push-to-hub", REPOSITORY, "--dry-run")
    assert prune(tiny_model_directory, tmp_path / "out", *options) == 0
    assert [name for name, _ in hub.calls] == ["whoami"]


@pytest.mark.parametrize(
    ("repository", "broken"), [(REPOSITORY, "whoami"), ("not a/name/at all", "nothing")]
)
def test_what_cannot_be_uploaded_is_not_pruned(
    repository: str,
    broken: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, broken)
    assert prune(tiny_model_directory, tmp_path / "out", "--push-to-hub", repository) == 2
    error = capsys.readouterr().err
    assert "cannot work" in error
    assert "hf auth login" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("broken", ["create_repo", "upload_folder"])
def test_a_failed_upload_leaves_the_checkpoint(
    broken: str,
    tmp_path: Path,
    tiny_model_directory: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend(monkeypatch, broken)
    output = tmp_path / "my sparse model"
    assert prune(tiny_model_directory, output, "--push-to-hub", REPOSITORY) == 2
    error = capsys.readouterr().err
    assert f"no {broken} today" in error
    assert f"`hf upload {REPOSITORY} '{output}'`" in error
    assert (output / "model.safetensors").exists()
