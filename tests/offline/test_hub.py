"""Uploading is opt-in, checked before the work, and never loses a finished checkpoint."""

import json
import re
import shlex
import socket
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import yaml
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from permllm_offline import api, hub
from permllm_offline.cli import main
from permllm_offline.errors import OfflineError
from permllm_offline.hub import check_push, push
from permllm_offline.preparation.recipe_input import make_recipe

REPOSITORY = "someone/tiny-2to4"
URL = f"https://huggingface.co/{REPOSITORY}/commit/0"


class PretendedHub:
    """Records what is asked of `HfApi`; `broken` methods fail.

    ``holds`` has the files of the repository and what is in them, ``refusal`` what is raised where
    it has none.
    """

    def __init__(self, *broken: str) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.holds: Mapping[str, Path] | None = None
        self.refusal: type[Exception] = RepositoryNotFoundError
        self.uploaded: dict[str, bytes] = {}
        self._broken = broken

    def _call(self, name: str, details: Any) -> None:
        self.calls.append((name, details))
        if name in self._broken:
            raise OSError(f"no {name} today")

    def whoami(self) -> dict[str, str]:
        self._call("whoami", None)
        return {"name": "someone"}

    def list_repo_files(self, repository: str) -> list[str]:
        self._call("list_repo_files", repository)
        if self.holds is None:
            raise self.refusal(
                "404", response=httpx.Response(404, request=httpx.Request("GET", URL))
            )
        return list(self.holds)

    def hf_hub_download(self, repository: str, file: str) -> str:
        assert self.holds is not None
        return str(self.holds[file])

    def create_repo(self, repository: str, **options: Any) -> SimpleNamespace:
        self._call("create_repo", (repository, options))
        return SimpleNamespace(repo_id=repository if "/" in repository else f"someone/{repository}")

    def upload_folder(self, **options: Any) -> SimpleNamespace:
        folder = Path(options["folder_path"])
        self.uploaded = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.glob("**/*")  # as the hub's client lists it
            if path.is_file()
        }
        files = sorted(self.uploaded)
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
        ("list_repo_files", REPOSITORY),
        ("create_repo", (REPOSITORY, {"private": True, "exist_ok": True})),
        ("upload_folder", (REPOSITORY, written)),
    ]
    assert {"model.safetensors", "README.md", "SHA256SUMS"} <= set(written)
    assert URL in capsys.readouterr().out


def test_files_in_folders_are_uploaded_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pretend(monkeypatch)
    contents = {"config.json": b"{}", "additional_chat_templates/report.json": b"no JSON"}
    (tmp_path / "additional_chat_templates").mkdir()
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    assert push(tmp_path, REPOSITORY) == URL
    assert hub.uploaded == contents


def test_a_name_without_owner_is_uploaded_to_what_the_hub_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pretend(monkeypatch)
    push(tmp_path, "sparse")
    assert hub.calls[-1] == ("upload_folder", ("someone/sparse", []))


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
    assert [name for name, _ in hub.calls] == ["whoami", "list_repo_files"]


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
    (line,) = re.findall(r"Upload it with: python -c (.*)$", error, re.MULTILINE)
    (code,) = shlex.split(line)
    again: list[tuple[Path, str]] = []
    monkeypatch.setattr(hub, "push", lambda *given: again.append(given))
    exec(code, {})
    assert again == [(output, REPOSITORY)]
    assert (output / "model.safetensors").exists()


def test_what_is_uploaded_names_no_folder_of_this_machine(
    tmp_path: Path,
    tiny_model_directory: Path,
    text_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub = pretend(monkeypatch)
    data = ("--dataset", str(text_file), "--num-samples", "4", "--sequence-length", "24")
    output = tmp_path / "out"
    assert prune(tiny_model_directory, output, "--push-to-hub", REPOSITORY, *data) == 0
    folders = (str(tiny_model_directory.parent), str(text_file.parent), str(tmp_path))
    for name, content in hub.uploaded.items():
        assert not any(folder.encode() in content for folder in folders), name
        same = content == (output / name).read_bytes()
        assert same == (name not in ("recipe.yaml", "report.json")), name
    recipe = yaml.safe_load(hub.uploaded["recipe.yaml"])
    here = yaml.safe_load((output / "recipe.yaml").read_text())
    assert here | {"model": "tiny", "dataset": "calibration.txt"} == recipe
    assert json.loads(hub.uploaded["report.json"])["recipe"] == recipe
    assert here["dataset"] == str(text_file)  # so that it can be pruned again here


@pytest.mark.parametrize("repository", ["someone/dense", "Someone/Dense", "dense"])
def test_the_model_itself_is_no_target(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OfflineError, match="whose weights the upload would take away"):
        check_push(repository, "someone/dense")
    (tmp_path / "someone" / "dense").mkdir(parents=True)
    check_push("someone/dense", "someone/dense")  # a folder here


def config(directory: Path, entries: Any) -> Path:
    file = directory / "config.json"
    file.write_text(json.dumps(entries))
    return file


def test_only_a_checkpoint_of_this_format_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = pretend(monkeypatch)
    files = {".gitattributes": tmp_path, "README.md": tmp_path}
    for holds in ({}, files):
        hub.holds = holds
        check_push(REPOSITORY, "m")
    dense = config(tmp_path, {"model_type": "llama"})
    for more in ({"data.csv": dense}, {"config.json": dense, "model.safetensors": dense}):
        hub.holds = files | more
        with pytest.raises(
            OfflineError, match=f"is no permllm checkpoint and holds {next(iter(more))}"
        ):
            check_push(REPOSITORY, "m")
    config(tmp_path, {"quantization_config": {"quant_method": "permllm"}})
    check_push(REPOSITORY, "m")


@pytest.mark.parametrize("entries", [[], {"quantization_config": None}, {"quantization_config": 1}])
def test_a_config_of_another_form_is_none_of_this_format(
    entries: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch).holds = {"config.json": config(tmp_path, entries)}
    with pytest.raises(OfflineError, match="is no permllm checkpoint and holds config"):
        check_push(REPOSITORY, "m")


def test_a_repository_that_cannot_be_looked_into_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch).refusal = GatedRepoError
    with pytest.raises(OfflineError, match="cannot work"):
        check_push(REPOSITORY, "m")
